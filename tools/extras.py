"""Print the requirements of one extra of pyproject.toml, for ``pip install -r``: pip cannot install an extra
without building the package that it belongs to."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with scikit-build-core

with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]]))
