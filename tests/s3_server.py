"""moto's S3 server, whose conditional puts are made atomic, as S3 promises.

moto looks whether the object is there and then puts it: between the two, another thread may.
"""

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

put, lock = S3Response.put_object, threading.Lock()


def put_object(self: S3Response) -> Any:
    with lock:
        return put(self)


S3Response.put_object = put_object  # type: ignore[method-assign]
main()
