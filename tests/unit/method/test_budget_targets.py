"""How many directions a site uses, and which come next."""

from __future__ import annotations

import pytest

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.layers.discovery import find_sites
from srlora_dist.method.budget import next_directions, num_next, plan_switches, share_out_directions_
from srlora_dist.method.schedule import EarlySwitch
from tests.ranks.engines import make_odd_net


def sites_with(**options: object) -> list:
    """Of ranks 4, 2 and 1, and 7, 7 and 3 directions."""
    sites = find_sites(make_odd_net())
    with pytest.warns(UserWarning, match="clamped"):
        share_out_directions_(sites, SRLoRAConfig(target_rank=7, **options))
    for site in sites:
        site.state.held, site.state.num_taken = list(range(site.rank)), site.rank
    return sites


def test_a_site_stops_when_its_directions_are_out() -> None:
    site = sites_with()[0]
    assert site.state.num_starts == site.state.target_rank == 7
    site.state.num_taken = 6
    assert num_next(site, 0.5) == 1
    site.state.num_taken = 7
    assert num_next(site, 0.5) == 0


def test_wrapping_leaves_out_the_directions_of_pairs_that_stay() -> None:
    site = sites_with(exhausted="wrap")[0]
    assert site.state.num_starts == 4 + 5 * 2  # the second site asks for 5 switches
    site.state.held, site.state.num_taken = [0, 5, 2, 6], 7
    assert num_next(site, 0.5) == 2
    assert next_directions(site, [1, 3], "wrap") == ([1, 3], 11)  # 0 and 2 stay
    assert next_directions(site, [0, 1], "wrap") == ([0, 1], 9)  # the direction of a fused pair is free
    site.state.num_taken = 6
    assert next_directions(site, [1, 3], "wrap") == ([6, 1], 9)


def test_renewed_directions_have_numbers_of_their_own() -> None:
    site = sites_with(exhausted="renew")[0]
    site.state.num_taken = 5
    assert next_directions(site, [0, 1], "renew") == ([5, 6], 7)
    site.state.num_taken = 6  # one is left where two are needed
    assert next_directions(site, [0, 1], "renew") == ([7, 8], 9)


def test_a_number_of_switches_can_be_asked_for() -> None:
    sites = sites_with(num_switches=3, exhausted="wrap")
    assert plan_switches(sites, SRLoRAConfig(target_rank=7, num_switches=3), 12) == [3, 6, 9]
    early = SRLoRAConfig(target_rank=7, num_switches=3, switch_until=0.5)
    assert plan_switches(sites, early, 12) == [2, 4, 6]
    with pytest.raises(ValueError, match="num_switches asks for 12 switches in 12 steps: train longer, lower it"):
        plan_switches(sites, SRLoRAConfig(target_rank=7, num_switches=12), 12)


def test_a_choice_has_settled_when_it_stays_the_same() -> None:
    settling = EarlySwitch(interval=16)
    assert [steps for steps in range(17) if settling.looks_after(steps)] == [6, 8, 10, 12, 14, 16]
    ten = [list(range(10))]
    assert not settling.has_settled(ten, 6)
    assert not settling.has_settled([[*range(8), 10, 11]], 8)  # eight of ten
    assert settling.has_settled([[*range(8), 10, 12]], 10)  # nine of ten
    settling.before = None
    assert not settling.has_settled(ten, 6)
    settling = EarlySwitch(interval=16)
    settling.has_settled(ten, 6)
    assert settling.has_settled(ten, 8)


def test_no_window_without_fixed_steps() -> None:
    with pytest.raises(ValueError, match="importance_window is 7.*choose auto"):
        SRLoRAConfig(switch_when="settled", importance_window=7)
