import torch

from apd_lens.decomposition._summary import Summary


def test_the_most_active_come_first_and_the_dead_are_counted():
    summary = Summary(
        active=torch.tensor([0.25, 0.0, 0.5]),
        attribution=torch.tensor([2.0, 0.0, 1.0]),
        norm={"w": torch.tensor([1.0, 3.0, 2.0])},
        effective_rank={"w": torch.tensor([1.0, 2.0, 1.5])},
        dead_share={"w": 0.75},
    )
    lines = str(summary).splitlines()
    assert lines[0].split() == ["component", "active", "attribution", "‖w‖", "eff.", "rank"]
    assert [line.split() for line in lines[2:4]] == [
        ["2", "50.00%", "1.0000", "2.000", "1.50"],
        ["0", "25.00%", "2.0000", "1.000", "1.00"],
    ]
    assert lines[-1] == "2 components active on this batch, 1 dead (together 0.75 of ‖w‖)"
