"""The example methods keep the contract: the suite that a plugin author runs, each case a test of its own.

The methods come from the third-party example package and from CONTRIBUTING.md, executed as they stand.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

from lightning_peft.testing import MethodConformance, tiny_gpt2

ROOT = Path(__file__).parent.parent


def from_file(path):
    spec = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_page(path):
    source = next(
        block for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL) if "(Method)" in block
    )
    module = sys.modules["conformance_page"] = types.ModuleType("conformance_page")
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), vars(module))
    return module


ia3 = from_file(ROOT / "examples" / "plugins" / "lightning-peft-ia3" / "lightning_peft_ia3.py")


class TestIA3(MethodConformance):
    method = ia3.IA3()


class TestIA3OnGPT2(MethodConformance):
    method = ia3.IA3()

    def model(self):
        return tiny_gpt2()


class TestFeatureScalingOfThePage(MethodConformance):
    method = from_page(ROOT / "CONTRIBUTING.md").FeatureScaling()

    def test_every_field_is_documented(self):
        """The suite reads the source file of a class; this class comes from a page, where a person reads it."""
        page = (ROOT / "CONTRIBUTING.md").read_text()
        assert re.search(r'    strength: float = .*\n    """', page)
