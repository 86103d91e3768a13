"""
MEND: three wrong answers corrected, one correction taken back
==============================================================

A small network answers some handwritten digits wrongly. An editor, trained once for this network, corrects three of
these answers by changing weights, each in a moment and without the training data:

.. image:: /tutorials/images/sphx_glr_plot_mend_001.png
   :alt: A digit, the probabilities of its answers before and after its correction, and how many others kept theirs.

One of the three: the digit, the probability of each answer before and after its correction, the share of 600 other
images that kept their answer, and below other views of the digit. This tutorial makes the picture, looks at what moved,
and takes one correction back, to the bit.
"""

# %%
# The network
# -----------
#
# Yours, trained as ever: here on 600 digits. 600 more train the editor, which learns more from images that the network
# has not seen; the rest is for tests.

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.methods import Guard, MetaExamples, RandomViews
from clkit.strategies import EditorTrainingStrategy

digits, labels = load_digits(return_X_y=True)
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
x = torch.from_numpy(digits).float()[order].view(-1, 1, 8, 8) / 16
y = torch.from_numpy(labels)[order]
parts = [TensorDataset(x[at], y[at]) for at in (slice(0, 600), slice(600, 1200))]
tested, truth = x[1200:], y[1200:]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


pl.seed_everything(0, verbose=False)
model = Classifier()
trainer = pl.Trainer(max_epochs=30)
trainer.fit(model, DataLoader(parts[0], batch_size=64, shuffle=True))


def probabilities(images):
    with torch.no_grad():
        return model.eval()(images).softmax(1)


before = probabilities(tested)
wrong = (before.argmax(1) != truth).nonzero()[:, 0]
print(f"{len(wrong)} of {len(truth)} test images are answered wrongly")

# %%
# The editor
# ----------
#
# The strategy freezes the network and trains an editor for it. Of each batch 8 images are edited, and 32 show what an
# edit has to leave alone. Views of an edited image, small crops, shall get its new label too.

views = RandomViews(flip=0.0, area=(0.7, 1.0))
strategy = EditorTrainingStrategy(examples=MetaExamples(equivalence=views))
trainer = pl.Trainer(max_epochs=10, strategy=strategy)
trainer.fit(model, DataLoader(parts[1], batch_size=40, shuffle=True))
editor = strategy.editor
print(torch.equal(probabilities(tested), before))  # the network is what it was

# %%
# Three corrections
# -----------------
#
# The smallest multiple of the proposed edit is taken that flips the image and three quarters of its views. The guard
# looks at the 600 images of the editor, and refuses what would cost more than 2 % of their answers. An image that an
# earlier correction has put right is passed over.

reference = parts[1].tensors
results = []
for row in wrong.tolist():
    was = probabilities(tested[row : row + 1])[0]
    if was.argmax() == truth[row]:
        continue
    result = editor.edit(
        tested[row : row + 1],
        truth[row : row + 1],
        views,
        guard=Guard(max_drop=0.02),
        reference=reference,
    )
    print(
        f"image {row}: {result.prediction_before[0]} -> {result.prediction_after[0]}, {result.status}, "
        f"{result.generality:.0%} of views, {result.locality.drop:.1%} of the reference lost"
    )
    if result.status == "applied":
        results.append((row, result, was, probabilities(tested[row : row + 1])[0]))
    if len(results) == 3:
        break

# %%
# A picture of each
# -----------------
#
# *Near-ties* are images whose two best answers were less than 0.05 apart: the easiest to disturb.

import matplotlib.pyplot as plt

from clkit.report.corrections import plot_edit

for row, result, was, then in results:
    generator = torch.Generator().manual_seed(row)
    plot_edit(
        tested[row],
        was,
        then,
        int(truth[row]),
        equivalents=list(views(tested[row].repeat(8, 1, 1, 1), generator)),
        locality=result.locality,
        figure=plt.figure(figsize=(8, 4.8), layout="constrained"),
    )
plt.show()

# %%
# What else moved
# ---------------

after = probabilities(tested)
answers = [each.argmax(1) for each in (before, after)]
moved = answers[0] != answers[1]
became = [(moved & (each == truth)).sum() for each in answers]
print(
    f"{moved.sum()} answers of {len(truth)} changed: {became[1]} became right, {became[0]} became wrong"
)
for row in (moved & (answers[0] == truth)).nonzero()[:3, 0].tolist():
    print(f"image {row}, a {truth[row]}: {answers[0][row]} -> {answers[1][row]}")

# %%
# Each point is a test image: what is off the diagonal has moved.

rows = torch.arange(len(truth))
corrected = torch.isin(rows, torch.tensor([row for row, *_ in results]))
figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
axes.plot([0, 1], [0, 1], color="0.8", zorder=0)
for chosen, size, colour, label in (
    (~corrected, 12, "0.4", "not edited"),
    (corrected, 60, "C0", "corrected"),
):
    own = rows[chosen]
    axes.scatter(
        before[own, truth[own]],
        after[own, truth[own]],
        s=size,
        color=colour,
        label=label,
    )
axes.set(xlabel="probability of the truth before", ylabel="after three corrections")
axes.legend(frameon=False)
plt.show()

# %%
# One taken back
# --------------
#
# Live weights are always the original ones and the sum of the edits in the log. Without the last edit, or any other,
# they are to the bit those that the rest gives; without any they are those of the beginning.

row, last, *_ = results[2]
editor.revert(last.id)
print(f"image {row}: {probabilities(tested[row : row + 1]).argmax()} again")
print(f"in the log: {[record.id for record in editor.log]}")
editor.revert_all()
print(torch.equal(probabilities(tested), before))
