"""Generate the code of this folder from its ``.proto`` files: ``python -m omcda_deploy.protos.generate``.

Generated code refuses a protobuf older than its generator's, so the floor of the run time is set by the
grpcio-tools that ran here; it is pinned to an old one on purpose.

``open_inference_grpc.proto`` becomes a descriptor set and a type stub, from which :mod:`omcda_deploy.protos.oip`
builds its messages; the others become ordinary ``_pb2`` modules.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata
from pathlib import Path

from omcda_deploy.errors import ConfigError, MissingExtraError

GENERATOR = "1.75.1"  # grpcio-tools: emits protobuf 6.31 code, which runs on protobuf 6 and 7
FOLDER = Path(__file__).resolve().parent
PACKAGE = "omcda_deploy/protos"  # where the generated imports must point


def generate(target: Path) -> list[Path]:
    """Write the generated files into ``target`` and return their paths.

    Raises :class:`MissingExtraError` without grpcio-tools and :class:`ConfigError` with another version of it,
    or where a ``.proto`` file does not compile.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise MissingExtraError("grpcio-tools", "dev") from error
    if (version := metadata.version("grpcio-tools")) != GENERATOR:
        raise ConfigError(f"expected grpcio-tools {GENERATOR}, found {version}: install the pinned one")
    with tempfile.TemporaryDirectory(dir=target) as temporary:
        root = Path(temporary)
        made = root / PACKAGE
        made.mkdir(parents=True)
        virtual = ["protoc", "-I", f"{PACKAGE}={FOLDER}"]
        commands = (
            [
                f"--python_out={root}",
                f"--pyi_out={root}",
                f"--grpc_python_out={root}",
                f"{PACKAGE}/policy.proto",
                f"{PACKAGE}/admin.proto",
            ],
            [f"--python_out={root}", f"--pyi_out={root}", f"{PACKAGE}/triton.proto"],
            [
                f"--descriptor_set_out={made / 'open_inference_grpc.binpb'}",
                f"--pyi_out={root}",
                f"{PACKAGE}/open_inference_grpc.proto",
            ],
        )
        for command in commands:
            if protoc.main([*virtual, *command]) != 0:
                raise ConfigError(f"protoc cannot compile {command[-1]}: correct what it names above")
        (made / "open_inference_grpc_pb2.pyi").rename(made / "oip.pyi")
        names = sorted(file.name for file in made.iterdir())
        for name in names:
            (made / name).replace(target / name)
    return [target / name for name in names]


if __name__ == "__main__":
    for path in generate(FOLDER):
        sys.stdout.write(f"{path}\n")
