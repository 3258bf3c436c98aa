"""The decode example on a GPU: five ways, one graph for each batch size, thousands of replays, the same tokens."""

import pytest
from decode_example import NAMES, decode, forgetting, run
from test_gpu_replay import too_large

pytestmark = pytest.mark.capture


@too_large
def test_five_ways_decode_the_same_over_thousands_of_replays():
    results = run(list(decode.WAYS), steps=1000, device="cuda")
    assert results["steps"] * len(results["rows"]) == 5000 and results["requests"] > 50
    launches = {row["way"]: row["launches"] for row in results["rows"]}
    made = launches["op"] - 1  # transfers, and kernels that make the tensors
    assert made >= 7
    # The page table's corner is strided, which makes foreach a loop of copies.
    assert launches == {"copy_": made + 6, "foreach": made + 6, "op": made + 1, "plan": 1, "update": 0}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_filled_shows_as_a_wrong_token(name, monkeypatch):
    monkeypatch.setitem(decode.WAYS, "forgetting", forgetting(name))
    with pytest.raises(decode.WrongToken, match="forgetting decoded"):
        run(["copy_", "forgetting"], steps=60, device="cuda")
