"""The questions: which tasks, judged by which numbers, which losses, which settings are tuned."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.quality import losses
from benchmarks.quality.boosting import Leaves
from benchmarks.quality.losses import Contender, cross_entropy, ranking
from benchmarks.quality.training import Budget, Setting

BCE, SQRT = "BCE", "sqrt-weighted BCE"
SQRT_BCE = cross_entropy(0.5)
MIX = ranking(temperature=0.3)._replace(weight=0.8, partner=SQRT_BCE)
CROSS_ENTROPIES = {
    BCE: Contender(cross_entropy(0.0)),
    SQRT: Contender(SQRT_BCE),
    "focal": Contender(losses.focal),
}


class Question(NamedTuple):
    """One question.

    Attributes:
        numbers: task -> the numbers that it is judged by.
        contenders: each loss by its name; of LightGBM the objective.
        settings, leaves: what is tuned, of networks and of LightGBM.
        ours: number -> the recipe.
        rivals: number -> the losses that it is compared with; None: with all.
        skipped: (task, loss) that make no sense.
    """

    numbers: dict[str, tuple[str, ...]]
    contenders: dict[str, Contender | str]
    settings: tuple[Setting, ...]
    ours: dict[str, str]
    rivals: dict[str, tuple[str, ...]] | None = None
    budget: Budget = Budget()
    leaves: tuple[Leaves, ...] = ()
    skipped: frozenset[tuple[str, str]] = frozenset()


TWO_RATES = (Setting(3e-3), Setting(1e-2))
OVER_ALL_ROWS = Question(
    numbers=dict.fromkeys(
        (
            *("protein", "shirts", "chess", "churn", "census", "credit", "satimage", "bank"),
            *("cancelled", "late"),
        ),
        ("AP",),
    ),
    contenders={
        **CROSS_ENTROPIES,
        "weighted BCE": Contender(cross_entropy(1.0)),
        "hard-negative BCE": Contender(losses.hard_negatives),
        "LibAUC APLoss": Contender(losses.libauc_ap, 0.25, "SOAP"),
        "SmoothAP + BCE": Contender(MIX),
        "SmoothAP": Contender(ranking()),
        "predecessor": Contender(losses.predecessor("SmoothAPLoss")),
    },
    settings=tuple(Setting(lr, decay) for lr in (3e-3, 1e-2) for decay in (1e-4, 1e-1)),
    ours={"AP": "SmoothAP + BCE"},
)

WITHIN = ranking()._replace(within=True)
WITHIN_AND_BCE = WITHIN._replace(temperature=0.3, weight=0.8, partner=SQRT_BCE)
GROUPS = Question(
    numbers={
        "protein": ("mean AP", "TOP1", "last positive"),
        "cancelled": ("mean AP", "20 alerts a day"),
        "votes": ("mean AP",),
        "grocery": ("mean AP",),
    },
    contenders={
        BCE: CROSS_ENTROPIES[BCE],
        SQRT: CROSS_ENTROPIES[SQRT],
        "focal": CROSS_ENTROPIES["focal"],
        f"{SQRT}, whole groups": Contender(SQRT_BCE, "groups"),
        "ListNet": Contender(losses.list_net, "groups"),
        "pairwise logistic": Contender(losses.pairwise, "groups"),
        "SmoothAP, all rows, whole groups": Contender(ranking(), "groups"),
        "SmoothAP within groups": Contender(WITHIN, "groups"),
        "SmoothAP within groups + BCE": Contender(WITHIN_AND_BCE, "groups"),
        "LightGBM binary": "binary",
        "LightGBM lambdarank": "lambdarank",
        "LightGBM rank_xendcg": "rank_xendcg",
    },
    settings=(Setting(), Setting(within=True)),
    ours=dict.fromkeys(("mean AP", "20 alerts a day"), "SmoothAP within groups + BCE"),
    budget=Budget(steps=500, batch_size=4096),
    leaves=(Leaves(31), Leaves(31, within=True)),
)

GRADED = Question(
    numbers={"votes, graded": ("NDCG@10",)},
    contenders={
        "BCE of grades": Contender(cross_entropy(0.0)),
        "ListNet": Contender(losses.list_net, "groups"),
        "NDCG within groups": Contender(ranking("NDCGLoss")._replace(within=True), "groups"),
    },
    settings=GROUPS.settings,
    ours={"NDCG@10": "NDCG within groups"},
    budget=GROUPS.budget,
)

AT_ONE = {
    "recall at 1 %": ranking("RecallAtKLoss", k=0.01),
    "recall at FPR 1 %": ranking("RecallAtFPRLoss", max_fpr=0.01),
    "recall at FPR 0.1 %": ranking("RecallAtFPRLoss", max_fpr=0.001),
    "pAUC to FPR 1 %": ranking("PartialAUCLoss", max_fpr=0.01),
}
MONEY = ranking("RecallAtKLoss", k=0.05)._replace(by_value=True)
BY_VALUE = ranking()._replace(by_value=True)
VALUED = {
    "money at 5 %": Contender(MONEY),
    "money at 5 %, half AP": Contender(MONEY._replace(weight=0.5, partner=BY_VALUE)),
    "SmoothAP by value": Contender(BY_VALUE),
    "value-weighted BCE": Contender(losses.value_weighted),
}
# LibAUC's, to FPR 1 %, takes minutes a run with more positives, for it compares all pairs.
LIBAUC = {"LibAUC pAUC": Contender(losses.libauc_partial_auc, 0.05)}
PREDECESSOR, PREDECESSOR_TENTH = (
    {
        f"predecessor, recall{name}": Contender(
            losses.predecessor("RecallAtQuantileLoss", quantile=budget)
        ),
        f"predecessor, pAUC{name}": Contender(losses.predecessor("PAUCAtBudgetLoss", beta=budget)),
    }
    for name, budget in (("", 0.01), (", 0.1 %", 0.001))
)
OPERATING_TASKS = ("loans", "protein", "census")
OPERATING = Question(
    numbers={
        task: (*AT_ONE, "money at 5 %") if task == "loans" else tuple(AT_ONE)
        for task in OPERATING_TASKS
    },
    contenders={
        BCE: CROSS_ENTROPIES[BCE],
        SQRT: CROSS_ENTROPIES[SQRT],
        "focal": CROSS_ENTROPIES["focal"],
        "SmoothAP": Contender(ranking()),
        **{name: Contender(loss) for name, loss in AT_ONE.items()},
        **{
            f"{name}, half AP": Contender(loss._replace(weight=0.5, partner=ranking()))
            for name, loss in AT_ONE.items()
        },
        **VALUED,
        **LIBAUC,
        **PREDECESSOR,
        **PREDECESSOR_TENTH,
    },
    settings=(Setting(),),
    ours={name: f"{name}, half AP" for name in (*AT_ONE, "money at 5 %")},
    rivals={
        name: (
            *(*CROSS_ENTROPIES, "SmoothAP", name, *LIBAUC),
            *(PREDECESSOR_TENTH if "0.1 %" in name else PREDECESSOR),
        )
        for name in AT_ONE
    }
    | {"money at 5 %": (BCE, "SmoothAP", *VALUED, "predecessor, recall")},
    budget=Budget(steps=500, batch_size=4096),
    skipped=frozenset((t, loss) for t in OPERATING_TASKS if t != "loans" for loss in VALUED)
    | frozenset((t, "LibAUC pAUC") for t in OPERATING_TASKS if t != "protein"),
)

CE, SQRT_CE = "CE", "sqrt-weighted CE"
NUM_DEPTHS = 18
AP_OF_CLASSES = ranking()._replace(num_classes=NUM_DEPTHS)
CLASSES = Question(
    numbers={"chess depths": ("macro AP",)},
    contenders={
        CE: Contender(losses.class_entropy(0.0)),
        SQRT_CE: Contender(losses.class_entropy(0.5)),
        **{
            f"SmoothAP + {name}": Contender(
                AP_OF_CLASSES._replace(
                    temperature=0.3, weight=0.8, partner=losses.class_entropy(power)
                )
            )
            for name, power in ((CE, 0.0), (SQRT_CE, 0.5))
        },
        "SmoothAP": Contender(AP_OF_CLASSES),
    },
    settings=OVER_ALL_ROWS.settings,
    ours={"macro AP": f"SmoothAP + {SQRT_CE}"},
    budget=Budget(num_outputs=NUM_DEPTHS),
)

# Batches with as many positives as negatives, and the prevalence known or not.
PREVALENCE = Question(
    numbers=dict.fromkeys(("protein", "chess"), ("AP",)),
    contenders={
        f"{name}, {how}": Contender(make, batches)
        for how, batches in (("as they come", "rows"), ("50 % positives", 0.5))
        for name, make in (
            (BCE, cross_entropy(0.0)),
            ("SmoothAP", ranking()),
            ("SmoothAP + BCE", MIX),
        )
    }
    | {
        f"{name}, 50 % positives, target_prior": Contender(make._replace(at_prior=True), 0.5)
        for name, make in (("SmoothAP", ranking()), ("SmoothAP + BCE", MIX))
    },
    settings=OVER_ALL_ROWS.settings,
    ours={"AP": "SmoothAP, 50 % positives"},
)

QUESTIONS = {
    "all-rows": OVER_ALL_ROWS,
    "groups": GROUPS,
    "graded": GRADED,
    "operating-points": OPERATING,
    "classes": CLASSES,
    "prevalence": PREVALENCE,
}
