"""Tests of the methods: DESIGN section 2, row by row, and the overrides of the ``lora`` section."""

from dataclasses import replace

import pytest

from sfed.config import load as config_load
from sfed.config import own_method
from sfed.methods.method import METHODS, check_joinable, resolve
from sfed.utils.errors import ConfigError, UserError

AB, A, B, NONE = ("A", "B"), ("A",), ("B",), ()
LORA, RSLORA, SFED = (0.0, -1.0), (0.0, -0.5), (0.5, -0.5)

# name -> trained and averaged in rounds 0, 1, 2, 3; exponents of N and r; independent draws of A
TABLE = {
    "sfed": ([AB] * 4, [A] * 4, SFED, True),
    "fedsa": ([AB] * 4, [A] * 4, LORA, False),
    "fedsa-rslora": ([AB] * 4, [A] * 4, RSLORA, False),
    "rolora": ([B, A, B, A], [B, A, B, A], LORA, False),
    "ffa": ([B] * 4, [B] * 4, LORA, False),
    "fedit": ([AB] * 4, [AB] * 4, LORA, False),
    "local": ([AB] * 4, [NONE] * 4, LORA, False),
    "flexlora": ([AB] * 4, [AB] * 4, LORA, False),
    "fedex": ([AB] * 4, [AB] * 4, LORA, False),
    "flora": ([AB] * 4, [AB] * 4, LORA, False),
    "hetlora": ([AB] * 4, [AB] * 4, LORA, False),
}


def resolved(name="sfed", **lora):
    return resolve(config_load.validate({"federated": {"method": name}, "lora": lora}))


def test_the_table_and_the_configuration_know_the_same_methods():
    assert set(METHODS) == set(TABLE) == set(own_method.METHOD_NAMES)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_is_its_row_of_the_table(name):
    trained, averaged, exponents, independent = TABLE[name]
    method = resolved(name)
    assert [method.trained_in(round_index) for round_index in range(4)] == trained
    assert [method.averaged_in(round_index) for round_index in range(4)] == averaged
    assert (method.name, method.exponents, method.independent_init) == (
        name,
        exponents,
        independent,
    )


@pytest.mark.parametrize("name", TABLE)
def test_the_turns_of_a_method_go_on_for_ever(name):
    method = METHODS[name]
    for round_index in range(100, 104):
        assert method.trained_in(round_index) == TABLE[name][0][round_index % 4]
        assert method.averaged_in(round_index) == TABLE[name][1][round_index % 4]


@pytest.mark.parametrize("name", TABLE)
def test_only_what_is_trained_is_averaged(name):
    method = METHODS[name]
    for round_index in range(4):
        assert set(method.averaged_in(round_index)) <= set(method.trained_in(round_index))


def test_rolora_begins_with_b_because_a_has_no_gradient_while_b_is_zero():
    assert METHODS["rolora"].trained_in(0) == ("B",)


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"local"}))
def test_a_method_whose_clients_share_a_has_a_global_adapter(name):
    assert METHODS[name].has_global_adapter


def test_clients_on_their_own_have_no_global_adapter():
    assert not METHODS["local"].has_global_adapter


@pytest.mark.parametrize("name", TABLE)
def test_alpha_is_the_methods_own_unless_it_is_given(name):
    assert resolved(name).alpha == METHODS[name].alpha
    assert resolved(name, alpha=7.5).alpha == 7.5


@pytest.mark.parametrize(("scaling", "exponents"), [("lora", LORA), ("rslora", RSLORA)])
@pytest.mark.parametrize("name", TABLE)
def test_gamma_can_be_chosen_by_name(name, scaling, exponents):
    assert resolved(name, scaling=scaling).exponents == exponents


@pytest.mark.parametrize("pair", [[0.0, 0.0], [0.25, -0.75], [1.0, -1.0], [-0.5, 0.5], ["1/3", 0]])
def test_gamma_can_be_chosen_by_its_exponents_for_ablations(pair):
    expected = tuple(1 / 3 if value == "1/3" else value for value in pair)
    assert resolved("sfed", scaling=pair).exponents == pytest.approx(expected)


def test_the_start_of_a_can_be_chosen():
    assert resolved("fedsa", init="independent").independent_init
    assert not resolved("sfed", init="shared", scaling="rslora").independent_init


def test_an_override_changes_nothing_else_of_a_method():
    plain, changed = resolved("rolora"), resolved("rolora", scaling="rslora", alpha=1.0)
    for round_index in range(4):
        assert plain.trained_in(round_index) == changed.trained_in(round_index)
        assert plain.averaged_in(round_index) == changed.averaged_in(round_index)
    assert plain.independent_init == changed.independent_init


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("sfed", {"init": "shared"}),
        ("fedsa", {"scaling": "sfed"}),
        ("sfed", {"init": "shared", "scaling": [0.1, -0.5]}),
        ("ffa", {"scaling": [1.0, 0.0]}),
        ("local", {"scaling": "sfed", "init": "shared"}),
    ],
)
def test_one_draw_of_a_with_a_growing_gamma_is_refused_unless_it_is_permitted(name, lora):
    with pytest.raises(UserError, match=r"lora\.init=shared") as caught:
        resolved(name, **lora)
    for remedy in ("lora.init=independent", "lora.scaling=rslora", "lora.allow_unstable=true"):
        assert remedy in str(caught.value)
    permitted = resolved(name, **lora, allow_unstable=True)
    assert permitted.exponents[0] > 0 and not permitted.independent_init


@pytest.mark.parametrize("name", ["flexlora", "fedex", "flora"])
def test_an_a_that_a_server_step_makes_is_refused_with_a_growing_gamma(name):
    asked = {"init": "independent", "scaling": "sfed"}
    with pytest.raises(
        UserError, match=f"federated.method={name} with a gamma that grow"
    ) as caught:
        resolved(name, **asked)
    for remedy in ("lora.scaling=rslora", "lora.allow_unstable=true"):
        assert remedy in str(caught.value)
    assert resolved(name, **asked, allow_unstable=True).exponents == SFED
    assert resolved("hetlora", **asked).exponents == SFED, "its A is a weighted mean"


@pytest.mark.parametrize("of_clients", [0.0, -0.5])
def test_one_draw_of_a_with_a_gamma_that_does_not_grow_is_accepted(of_clients):
    assert resolved("sfed", init="shared", scaling=[of_clients, -0.5]).exponents[0] == of_clients


APART = {"sfed": B, "fedsa": B, "fedsa-rslora": B, "rolora": NONE, "ffa": NONE, "fedit": NONE}


@pytest.mark.parametrize(("name", "apart"), [*APART.items(), ("local", AB)])
def test_a_factor_is_kept_apart_where_a_round_trains_and_does_not_average_it(name, apart):
    method = METHODS[name]
    assert tuple(factor for factor in AB if method.keeps_apart(factor)) == apart


def test_ablations_change_what_is_kept_apart():
    config = {"federated": {"method": "fedit", "averaged": ["A"]}}
    assert resolve(config_load.validate(config)).keeps_apart("B")
    own = {"federated": {"method": "ffa"}, "lora": {"init": "independent"}}
    assert not resolve(config_load.validate(own)).keeps_apart("A"), "averaged before the first step"
    own = {"federated": {"method": "local"}, "lora": {"init": "independent"}}
    assert resolve(config_load.validate(own)).keeps_apart("A")


# --- adapters on disk -----------------------------------------------------------------------------

COMMON = dict.fromkeys(("sfed", "fedsa", "fedsa-rslora"), A)
COMMON |= dict.fromkeys(("rolora", "ffa", "fedit"), AB) | {"local": NONE}
COMMON |= dict.fromkeys(("flexlora", "fedex", "flora", "hetlora"), AB)


def with_keys(**federated):
    return config_load.validate({"federated": federated})


@pytest.mark.parametrize("name", TABLE)
def test_what_clients_have_in_common_in_the_end(name):
    assert METHODS[name].common == COMMON[name]


@pytest.mark.parametrize("name", TABLE)
def test_who_joins_trains_b_alone_and_has_no_global_adapter(name):
    method = resolve(with_keys(method=name, join="runs/demo"))
    assert [method.trained_in(i) for i in range(4)] == [B] * 4
    assert [method.averaged_in(i) for i in range(4)] == [NONE] * 4
    assert not method.has_global_adapter
    assert not method.needs_common_a
    assert method.common == A, "others can join those who have joined"


@pytest.mark.parametrize("name", TABLE)
def test_adapters_on_disk_bring_their_a_and_gamma(name):
    method = resolved(name, start_from="adapters", init="shared")
    assert not method.independent_init
    assert not method.averages_a_at_start
    assert (method.trained, method.averaged) == (METHODS[name].trained, METHODS[name].averaged)


@pytest.mark.parametrize("name", TABLE)
def test_who_averages_b_before_a_needs_the_same_a(name):
    assert METHODS[name].needs_common_a == (name in ("rolora", "ffa"))


def test_a_run_whose_clients_keep_a_cannot_be_joined():
    for federated in ({"method": "local"}, {"method": "fedsa", "averaged": ["B"]}):
        with pytest.raises(ConfigError, match="leaves each client an A of its own") as mistake:
            check_joinable(with_keys(**federated), "runs/x")
        named = str(mistake.value).rpartition("such as one of ")[2].split(", ")
        assert len(named) == len(
            [check_joinable(with_keys(method=name), "runs/x") for name in named]
        )
    assert check_joinable(with_keys(method="fedit"), "runs/x") == AB
    with pytest.raises(ConfigError, match="fedex has changed the frozen weights"):
        check_joinable(with_keys(method="fedex"), "runs/x")
    assert check_joinable(with_keys(method="local", averaged=["A"]), "runs/x") == A


@pytest.mark.parametrize("name", ["flexlora", "fedex", "flora"])
def test_moments_of_a_basis_that_is_gone_are_not_kept(name):
    assert not resolved(name).keeps_moments
    config = {"federated": {"method": name, "optimizer_state": "keep"}}
    with pytest.raises(UserError, match=f"optimizer_state=keep: the server step of {name}"):
        resolve(config_load.validate(config))


def test_a_method_with_weights_of_its_own_takes_no_others():
    assert resolved("hetlora").keeps_moments
    config = {"federated": {"method": "hetlora", "weighting": "examples"}}
    with pytest.raises(UserError, match=r"federated\.weighting=examples: hetlora weights its"):
        resolve(config_load.validate(config))


@pytest.mark.parametrize(
    ("backbone", "key"),
    [
        ({"offload": "cpu", "sharding": "zero3"}, "backbone.offload=cpu"),
        ({"compute": "fp8"}, "backbone.compute=fp8"),
        *(
            (
                {"sharding": "zero3", "deepspeed": {"zero_optimization": {name: value}}},
                f"backbone.deepspeed.zero_optimization.{name}",
            )
            for name, value in (
                ("zero_hpz_partition_size", 2),
                ("zero_quantized_weights", True),
                ("offload_param", {"device": "cpu"}),
            )
        ),
    ],
)
def test_weights_that_are_elsewhere_too_are_changed_by_no_method(backbone, key):
    for name in ("fedex", "flora"):
        with pytest.raises(UserError, match="changes the frozen weights") as caught:
            resolve(config_load.validate({"federated": {"method": name}, "backbone": backbone}))
        assert str(caught.value).startswith(key)
        assert "flexlora" in str(caught.value)
    resolve(config_load.validate({"federated": {"method": "flexlora"}, "backbone": backbone}))


def test_a_server_step_says_whether_it_takes_clients_of_different_ranks() -> None:
    stepped = replace(METHODS["fedsa"], server_step=lambda sent: sent, name="mine")
    assert stepped.gammas([4, 4], [1.0, 1.0]) == (4.0, 4.0)
    with pytest.raises(ConfigError, match=r"'mine': its server step does not say .*mixed_ranks"):
        stepped.gammas([4, 8], [1.0, 1.0])
    assert replace(stepped, mixed_ranks=True).gammas([4, 8], [1.0, 1.0]) == (4.0, 2.0)
    assert METHODS["fedsa"].gammas([4, 8], [1.0, 1.0]) == (4.0, 2.0)


def test_what_else_of_a_method_takes_one_rank_alone() -> None:
    weighed = replace(METHODS["fedit"], weighed_by=lambda layers: 1.0)
    with pytest.raises(ConfigError, match=r"its weight of a client does not say .*mixed_ranks"):
        weighed.gammas([4, 8], [1.0, 1.0])
    assert replace(weighed, mixed_ranks=True).gammas([4, 8], [1.0, 1.0]) == (4.0, 2.0)
    local = replace(METHODS["fedit"], local_term=lambda held: {}, mixed_ranks=True)
    with pytest.raises(ConfigError, match="its local term takes one gamma"):
        local.gammas([4, 8], [1.0, 1.0])
    assert local.gammas([8, 8], [1.0, 1.0]) == (2.0, 2.0)


@pytest.mark.parametrize("name", TABLE)
def test_which_methods_take_clients_of_different_ranks(name: str) -> None:
    method, ranks = METHODS[name], [4, 8, 64]
    if name == "fedex":
        with pytest.raises(ConfigError, match="different LoRA ranks"):
            method.gammas(ranks, [1.0] * 3)
        return
    found = method.gammas(ranks, [1.0] * 3)
    expected = {
        "sfed": [2 / total**0.5 for total in (4 / 3, 4 / 3 + 2, 4 / 3 + 2 + 56)],
        "fedsa-rslora": [4.0 / rank**0.5 for rank in ranks],
    }.get(name, [16.0 / rank for rank in ranks])
    assert found == pytest.approx(expected, rel=1e-6)
