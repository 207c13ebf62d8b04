"""A server of Cloud Storage's protocol on this machine, for this process and those it starts."""

import contextlib
import os

from etils import epath
from gcp_storage_emulator.server import create_server
from gcsfs import GCSFileSystem

from spvit_jax import paths

# Where the three clients look for the server: gcsfs, ArrayRecord, and orbax's tensorstore.
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "TENSORSTORE_GCS_HTTP_URL",
)


@contextlib.contextmanager
def serving(name):
    """Yields an empty bucket, `gs://name`, of a server that ends with the context."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=name)
    server.start()
    with answered_by(server._api._httpd.server_port):
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
    GCSFileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    paths._check_bucket.cache_clear()
