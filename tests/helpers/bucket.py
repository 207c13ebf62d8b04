"""A server of Cloud Storage's protocol on this machine, for this process and those it starts."""

import contextlib
import os
import socketserver
from http import HTTPStatus

from etils import epath
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound

from spvit_jax import paths

# Where the three clients look for the server: gcsfs, ArrayRecord, and orbax's tensorstore.
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "TENSORSTORE_GCS_HTTP_URL",
)
socketserver.TCPServer.request_queue_size = 128  # tensorstore opens many connections at once


@contextlib.contextmanager
def serving(name):
    """Yields an empty bucket, `gs://name`, of a server that ends with the context."""
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=name)
    server.start()
    listening = server._api._httpd
    listening.handle_error = lambda *_: None  # a client that is killed
    with answered_by(listening.server_port):
        yield epath.Path(f"gs://{name}")
    server.stop()


@contextlib.contextmanager
def answered_by(port):
    """Sends what is asked of Cloud Storage to a port of this machine."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(dict.fromkeys(VARIABLES, f"http://127.0.0.1:{port}"))
    _forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _forget()


def _forget():
    """Forgets the clients that are connected, and what they have said about buckets."""
    from gcsfs import GCSFileSystem  # after the package, which sets it up

    GCSFileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    paths._check_bucket.cache_clear()


def _with_generations(handle):
    """Adds to one of the emulator's handlers what it lacks of the protocol, and tensorstore needs.

    An object's generation is a header of its content, and a condition of reading and writing it:
    https://cloud.google.com/storage/docs/request-preconditions
    """

    def handled(request, response, storage):
        params, query = request.params or {}, request.query
        name = params.get("object_id") or query.get("name", [None])[0]
        if query.get("uploadType") == ["multipart"]:
            name = request.data["meta"].get("name", name)

        def generation():
            try:
                return storage.get_file_obj(params["bucket_name"], name)["generation"]
            except (KeyError, NotFound):
                return "0"

        if query.get("ifGenerationMatch", [generation()])[0] != generation():
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif query.get("ifGenerationNotMatch", [None])[0] == generation():
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handle(request, response, storage)
            if query.get("alt") == ["media"]:
                response["x-goog-generation"] = generation()

    return handled


for _, handlers in emulator.HANDLERS:
    for method, handle in handlers.items():
        handlers[method] = _with_generations(handle)
