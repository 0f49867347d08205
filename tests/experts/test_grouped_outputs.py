"""Where the grouped kernels are told that an expert's matrices lie."""

from __future__ import annotations

import pytest

from tests.grouped_layers import make_layer


@pytest.mark.parametrize(("form", "group"), [("plain", 0), ("int8", 1), ("int4", 16)])
def test_places_are_those_of_the_layout(form: str, group: int) -> None:
    layer = make_layer("cpu", form=form)
    slabs, layout = layer.slabs.slabs, layer.slabs.layouts[0]
    assert (slabs.group, slabs.width, slabs.aligned) == (group, 48, 16)
    wanted = [where or 0 for one in (layout.gate, layout.up, layout.down) for where in (one.offset, one.scales)]
    assert slabs.places.tolist() == [wanted] * 6
