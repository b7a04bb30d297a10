"""The recipes that come with stepwise: each is read, and says what its method says."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwise import recipe

NAMES = [name for name, _ in recipe.shipped()]


def preference_stages(name: str) -> dict[str, recipe.RsaStage]:
    stages = recipe.load(name).stages
    return {key: stage for key, stage in stages.items() if isinstance(stage, recipe.RsaStage)}


def test_these_recipes_are_shipped() -> None:
    assert NAMES == [
        "constrained_local",
        "cost_local",
        "cost_pku_7b",
        "dpo_hh",
        "game_local",
        "game_pku_2b",
        "game_pku_2b_neutral",
        "game_sandbox",
        "quickstart",
        "ra_dpo_hh",
        "ra_rlhf_imdb",
        "ra_rlhf_imdb_7b",
        "ra_rlhf_jigsaw",
        "ra_rlhf_local",
        "ra_rlhf_rtp",
        "ra_rlhf_sandbox",
        "reward_pku_7b",
        "rlhf_imdb",
        "rsa_local",
        "rsa_pku_7b",
        "rsa_pku_7b_erm",
        "sacpo_pku_7b",
        "safe_rlhf_pku_7b",
        "safe_rlhf_sandbox",
        "tdpo_hh",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_read_and_equal_after_writing(name: str, tmp_path: Path) -> None:
    found = recipe.load(name)
    assert found.name == name
    path = tmp_path / "written.yaml"
    path.write_text(recipe.dump_yaml(found), encoding="utf-8")
    assert recipe.load(path) == found


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_says_what_it_does_in_one_line(name: str) -> None:
    line = dict(recipe.shipped())[name]
    assert 20 < len(line) < 120
    assert line.endswith(".")


# (alpha, risk measure and its number, temperature) of every preference stage, from the papers and the notes on them.
METHODS = {
    "dpo_hh": {"preference": (0.0, ["mean"], 0.1)},
    "tdpo_hh": {"preference": (0.5, ["mean"], 0.1)},
    "ra_dpo_hh": {"preference": (0.5, ["cvar", 0.97], 0.1)},
    "sacpo_pku_7b": {"helpful": (0.0, ["mean"], 0.1), "safe": (0.0, ["mean"], 0.025)},
    "rsa_pku_7b": {"helpful": (0.5, ["cvar", 0.97], 0.1), "safe": (0.5, ["cvar", 0.97], 0.025)},
    "rsa_pku_7b_erm": {"helpful": (0.5, ["entropic", 1.0], 0.1), "safe": (0.5, ["entropic", 1.0], 0.025)},
    "rsa_local": {"helpful": (0.5, ["cvar", 0.97], 0.1), "safe": (0.5, ["cvar", 0.97], 0.025)},
    "constrained_local": {"helpful": (0.5, ["cvar", 0.97], 0.1), "safe": (0.5, ["cvar", 0.97], 0.05)},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_shipped_recipe_is_the_method_of_its_name(name: str) -> None:
    found = recipe.load(name)
    for stage, (alpha, risk, beta) in METHODS[name].items():
        part = preference_stages(name)[stage]
        assert part.loss == "rsa"
        assert part.alpha == alpha
        assert part.risk is not None
        assert [value for _, value in part.risk] == risk
        assert found.resolved_beta(stage) == pytest.approx(beta)
    assert preference_stages(name).keys() == METHODS[name].keys()


@pytest.mark.parametrize("name", ["rsa_pku_7b", "rsa_pku_7b_erm", "sacpo_pku_7b"])
def test_the_recipes_on_pku_safe_rlhf_have_the_published_settings(name: str) -> None:
    found = recipe.load(name)
    assert found.model.base == "PKU-Alignment/alpaca-7b-reproduced"
    assert found.model.quantization == "nf4"
    assert found.model.template == "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
    for stage, label in {"helpful": "better", "safe": "safer"}.items():
        training, data = found.training_of(stage), found.stages[stage].data
        assert (data.path, data.label, data.limit) == ("PKU-Alignment/PKU-SafeRLHF-30K", label, None)
        assert (training.epochs, training.learning_rate, training.scheduler, training.warmup) == (
            3,
            2e-5,
            "cosine",
            0.03,
        )
        assert (training.batch_size, training.max_length, training.max_prompt_length) == (64, 512, 128)
    assert found.evaluate is not None
    assert (found.evaluate.data.split.partition("[")[0], found.evaluate.temperature) == ("test", 0)


@pytest.mark.parametrize(("name", "epochs", "clip", "batch"), [("tdpo_hh", 3, 10, 64), ("ra_dpo_hh", 1, 5, 32)])
def test_the_recipes_on_hh_have_the_published_settings(name: str, epochs: float, clip: float, batch: int) -> None:
    training = recipe.load(name).training_of("preference")
    assert (training.epochs, training.max_grad_norm, training.batch_size) == (epochs, clip, batch)
    assert (training.learning_rate, training.max_length, training.max_prompt_length) == (5e-6, 512, 256)


def test_quickstart_needs_nothing_but_a_cpu() -> None:
    found = recipe.load("quickstart")
    assert (found.model.base, found.model.dtype) == ("sandbox", "float32")
    assert all(stage.data.is_sandbox for stage in found.stages.values())
    assert list(found.stages) == ["sft", "helpful", "safe"]
    assert found.evaluate is not None
    assert found.evaluate.data.is_sandbox


def test_the_local_recipe_takes_its_paths_by_override() -> None:
    found = recipe.load(
        "rsa_local",
        [
            "model.base=/models/mine",
            "stages.helpful.data.path=a.jsonl",
            "stages.safe.data.path=b.jsonl",
            "evaluate.data.path=c.jsonl",
        ],
    )
    paths = [found.model.base, *(stage.data.path for stage in found.stages.values())]
    assert paths == ["/models/mine", "a.jsonl", "b.jsonl"]
    assert not any(text in recipe.dump_yaml(found) for text in ("./model", "./data"))


def test_the_recipes_of_ra_rlhf_have_the_published_settings() -> None:
    for name in ("ra_rlhf_local", "ra_rlhf_sandbox"):
        found = recipe.load(name)
        stage, training = found.stages["aligned"], found.training_of("aligned")
        assert isinstance(stage, recipe.RaRlhfStage) and stage.tail is not None
        assert (stage.batch, stage.tail.rho, stage.lam, stage.clip, stage.value_weight) == (128, 0.95, 0.95, 0.2, 0.1)
        assert (stage.rank_by, stage.samples, stage.kl.target, stage.kl.horizon) == ("mc_kl", 1, 6, 1e4)
        assert (training.epochs, training.batch_size, training.scheduler, training.warmup) == (4, 128, "constant", 0)
    local = recipe.load("ra_rlhf_local").stages["aligned"]
    assert isinstance(local, recipe.RaRlhfStage) and local.tail is not None
    assert (local.iterations, local.tail.alpha, local.tail.warmup, local.kl.beta) == (288, 0.2, 30, 0.2)
    assert (local.clip_value, local.max_new_tokens) == (0.2, 32)


# alpha, warm-up, iterations, batch, prompt and new tokens, learning rate of 2501.06911, its tables of constants.
RA_RLHF = {
    "ra_rlhf_imdb": (0.4, 30, 194, 128, 64, 48, 1.41e-5),
    "rlhf_imdb": (1.0, 30, 194, 128, 64, 48, 1.41e-5),
    "ra_rlhf_jigsaw": (0.2, 30, 288, 128, 8, 32, 1.41e-5),
    "ra_rlhf_rtp": (0.2, 30, 452, 128, 32, 32, 2.82e-5),
    "ra_rlhf_imdb_7b": (0.2, 300, 3601, 8, 64, 48, 2.94e-5),
}


@pytest.mark.parametrize("name", RA_RLHF)
def test_the_recipes_of_the_tasks_of_ra_rlhf_have_its_constants(name: str) -> None:
    found = recipe.load(name)
    stage, training = found.stages["aligned"], found.training_of("aligned")
    assert isinstance(stage, recipe.RaRlhfStage) and stage.tail is not None
    schedule = (stage.tail.alpha, stage.tail.warmup, stage.iterations, stage.batch)
    assert (*schedule, training.max_prompt_length, stage.max_new_tokens, training.learning_rate) == RA_RLHF[name]
    assert (stage.tail.rho, stage.lam, stage.clip, stage.clip_value, stage.value_weight) == (0.95, 0.95, 0.2, 0.2, 0.1)
    assert (stage.kl.beta, stage.kl.target, stage.kl.horizon, training.epochs) == (0.2, 6, 1e4, 4)
    assert found.model.quantization == ("nf4" if name.endswith("7b") else "none")


def test_the_twin_on_imdb_differs_in_its_tail_alone() -> None:
    changed = recipe.difference(recipe.load("ra_rlhf_imdb"), recipe.load("rlhf_imdb"))
    assert [key for key, _, _ in changed] == ["name", "stages.aligned.tail.alpha"]


def test_the_recipe_of_safe_rlhf_has_the_settings_of_its_script() -> None:
    stage = recipe.load("safe_rlhf_pku_7b").stages["aligned"]
    assert isinstance(stage, recipe.PpoLagrangianStage) and stage.ptx is not None
    assert (stage.kl.beta, stage.clip, stage.clip_value, stage.lam, stage.ptx.weight) == (0.01, 0.2, 5, 0.95, 16)
    assert stage.multiplier.model_dump(include={"init", "lr", "max"}) == {"init": 1, "lr": 0.1, "max": 5}


def test_the_neutral_twin_of_a_game_differs_by_its_risk_alone() -> None:
    game, twin = recipe.load("game_pku_2b"), recipe.load("game_pku_2b_neutral")
    changed = {key.removeprefix("stages.game.").partition(".")[0] for key, *_ in recipe.difference(game, twin)}
    assert changed == {"name", "risk", "strata"}
    stage = game.stages["game"]
    assert isinstance(stage, recipe.GameStage) and stage.strata is not None
    assert (stage.beta, stage.samples, stage.max_new_tokens, stage.solver) == (0.1, 8, 64, "extragradient")
    assert stage.risk == recipe.EntropicRisk(measure="entropic", eta=5.0)
