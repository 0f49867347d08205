"""Build hook: brings the presets into the wheel, and the CPU kernels, compiled, where there is a C compiler."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("offload_engine") / "kernels"


class BuildHook(BuildHookInterface):  # type: ignore[misc]
    """Runs offload_engine/kernels/build.py, which imports nothing of the package. An editable installation has its
    presets where the checkout has them.
    """

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile in place; the wheel then carries the library and this platform's tag."""
        if version == "standard":
            build_data["force_include"][str(Path(self.root) / "configs")] = "offload_engine/configs"
        spec = importlib.util.spec_from_file_location("kernels_build", Path(self.root) / KERNELS / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except module.BuildError as error:
            self.app.display_warning(f"CPU kernels not built, torch will compute experts: {error}")
            return
        build_data["artifacts"].append(str((KERNELS / library.name).as_posix()))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
