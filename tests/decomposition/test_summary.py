import torch

import apd_lens as apd
from apd_lens.decomposition._summary import Summary


def test_the_most_active_come_first_and_the_dead_are_counted():
    summary = Summary(
        active=torch.tensor([0.25, 0.0, 0.5]),
        attribution=torch.tensor([2.0, 0.0, 1.0]),
        norm={"w": torch.tensor([1.0, 3.0, 2.0])},
        effective_rank={"w": torch.tensor([1.0, 2.0, 1.5])},
        dead_share={"w": 0.75},
        rest={"all": 0.25},
    )
    lines = str(summary).splitlines()
    assert lines[0].split() == ["component", "active", "attribution", "‖w‖", "eff.", "rank"]
    assert [line.split() for line in lines[2:4]] == [
        ["2", "50.00%", "1.0000", "2.000", "1.50"],
        ["0", "25.00%", "2.0000", "1.000", "1.00"],
    ]
    assert lines[-2] == "2 components active on this batch, 1 dead (together 0.75 of ‖w‖)"
    assert lines[-1] == "the rest W − Σ P: 0.25 of ‖W‖"
    table = summary.table()
    assert table.columns.tolist() == ["active", "attribution", "‖w‖", "w, effective rank"]
    assert table["‖w‖"].tolist() == [1.0, 3.0, 2.0]


def test_many_matrices_of_long_names_fit_in_120_columns():
    names = [f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (22, 23) for side in "qkvo"]

    def summary(some: list[str]) -> list[str]:
        return str(
            Summary(
                active=torch.tensor([0.25, 0.0, 0.5]),
                attribution=torch.tensor([2.0, 0.0, 1.0]),
                norm={name: torch.tensor([1.0, 3.0, 2.0 + i]) for i, name in enumerate(some)},
                effective_rank={name: torch.full((3,), 1.5) for name in some},
                dead_share={name: 0.01 * i for i, name in enumerate(some)},
                rest={"all": 0.25},
            )
        ).splitlines()

    for some in (names[:2], names[:4], names):
        lines = summary(some)
        assert max(map(len, lines)) <= 120
        assert lines[-1] == "L22 q is model.layers.22.self_attn.q_proj.weight"
    assert lines[0].split("  ")[-1] == "largest norms (effective ranks)"
    assert lines[2].split()[3:6] == ["L23", "o", "9.000"]
    assert lines[2].endswith(" others")
    assert "(together 0.07 of ‖L23 o‖, 0.06 of ‖L23 v‖ and 6 others)" in lines[-3]
    assert "‖L22 k‖" in summary(names[:2])[0]


def test_where_attributions_are_estimates_it_says_how_well_they_agree():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 9), torch.randn(12, 6)

    def summary(projections: int | str) -> Summary:
        attribution = apd.GradientAttribution(projections=projections)
        return apd.init(model, n_components=8, rank=1, attribution=attribution).decomposition().summary(x)

    assert "estimates" not in str(summary("exact"))
    assert summary(1).agreement is None
    some = summary(4)
    assert some.agreement is not None
    assert 0 < some.agreement < 1
    assert str(some).splitlines()[-1].startswith("attributions are estimates, whose two halves agree on ")
