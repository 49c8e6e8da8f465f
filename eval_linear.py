"""How much can a linear classifier read from frozen features? All learning rates at once.

    logits = x̂ W + b,    x̂ = (x - mean) / std of the training features,    loss = cross-entropy

L heads, one per learning rate, are trained side by side as one matrix product, by SGD with momentum
.9, no weight decay and a cosine schedule (DINO's probe, arXiv 2104.14294, with the feature
normalisation of MAE's, arXiv 2111.06377, table 9). A held-out tenth of the training images chooses
the learning rate. Features are computed once; with --augment each epoch sees new crops and flips.

With --shots S, from S labelled images of each class, a held-out tenth is too little: ridge
regression on one-hot labels, its strength chosen by cross-validation within the labelled images.

    python eval_linear.py --checkpoint runs/rkd-textures/checkpoint.pt
    python eval_linear.py --checkpoint c.pt --data folder --data-path /imagenet --augment
    python eval_linear.py --checkpoint c.pt --shots 5 --draws 10 --shift blur
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint dino.pt --arch vit_small --pool last4 ..

Left out: LARS and batches of 16384; MAE-like features gain about a point from them.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import train_batches
from eval_knn import (all_gather, evaluation_options, features_of, held_out, number,
                      over_strengths, per_strength, percent, report, report_few_labels, start,
                      whole)
from randomness import generator


class Heads:
    """L linear classifiers side by side, each with its learning rate: one product for several.

    The bias is the weight of a feature that is always 1.
    """

    def __init__(self, lrs, width, classes, device="cpu"):
        self.lrs = torch.tensor(lrs, device=device).view(-1, 1, 1)
        self.weight = torch.zeros(len(lrs), classes, width + 1, device=device)
        self.velocity = torch.zeros_like(self.weight)
        self.parameters = self.weight[..., :-1].mT, self.weight[..., -1:].mT  # views, (L, ., C)

    def logits(self, x):
        """(B, D) -> (L, B, C)."""
        return F.pad(x, (0, 1), value=1.0) @ self.weight.mT

    def step(self, x, labels, progress):
        """One SGD step on features (B, D): d cross-entropy / d logits = softmax - one-hot."""
        x, images = F.pad(x, (0, 1), value=1.0), torch.arange(len(x), device=x.device)
        lrs, C = self.lrs * (1 + math.cos(math.pi * progress)) / 2, self.weight.shape[1]
        heads = max(1, 2**20 // (C * len(x)))  # at a time: their logits stay in the cache
        parts = (part.split(heads) for part in (self.weight, self.velocity, lrs))
        for weight, velocity, lr in zip(*parts):
            error = (x @ weight.flatten(0, 1).T).view(len(x), -1, C)
            error.sub_(error.amax(2, keepdim=True)).exp_()
            error.div_(error.sum(2, keepdim=True))  # in place, F.softmax is slow on few classes
            error[images, :, labels] -= 1
            velocity.flatten(0, 1).addmm_(error.flatten(1).T, x, beta=0.9, alpha=1 / len(x))
            weight.addcmul_(velocity, lr, value=-1)

    def accuracy(self, x, labels):
        """Percent right of each head, a list of L."""
        right = [self.logits(a).argmax(2) == b for a, b in zip(x.split(4096), labels.split(4096))]
        return [percent(row) for row in torch.cat(right, 1)]


# of ridge, per labelled image; the first is that of one image per class
STRENGTHS = [1.0, *(10 ** (i / 2) for i in range(-6, 7) if i)]


def ridge_scores(x, y, queries, strengths, classes):
    """Ridge regression on one-hot labels, in closed form for several strengths at once.

        min over W, b of  sum_i |W x̂_i + b - onehot(y_i)|² + n · strength · |W|²

    (n, D), (n,), (M, D) -> {strength: class scores (M, C)}; x̂ is standardised by these n images.
    """
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-6)
    x, queries = (((a - mean) / std).double() for a in (x, queries))
    target = F.one_hot(y, classes).double()
    b = target.mean(0)
    U, s, V = torch.linalg.svd(x, full_matrices=False)
    along, queries = U.T @ (target - b), queries @ V.T
    return {strength: b + queries @ (along * (s / (s**2 + len(x) * strength)).unsqueeze(1))
            for strength in strengths}


def orders(indices, args):
    """(epoch, indices) per batch: one permutation per epoch, the smaller last batch included."""
    for epoch in range(args.epochs):
        order = torch.randperm(len(indices), generator=generator(args.seed, epoch))
        for batch in order.split(args.batch_size):
            yield epoch, indices[batch]


def augmented(args, vit, data, indices):
    """(features, labels) of fresh crops (area .08 .. 1, as published) and flips, batch by batch.

    Each process encodes its share of a batch, and all get the whole. A batch with fewer images than
    processes is encoded whole by each.
    """
    shares = ((epoch, i.tensor_split(args.world)[args.rank] if len(i) >= args.world else i)
              for epoch, i in orders(indices, args))
    views = [(args.image_size, (0.08, 1.0))]
    loaded = train_batches(data, shares, views, args.seed, args.device, args.workers)
    for (_, whole_batch), (index, (images,), _) in zip(orders(indices, args), loaded):
        batch = features_of(vit, images, args.pool).float().cpu(), data.labels[index.cpu()]
        if len(whole_batch) >= args.world:
            batch = [torch.cat(x) for x in zip(*all_gather(batch))]
        yield batch


@torch.no_grad()
def main():
    parser = evaluation_options(__doc__)
    add = parser.add_argument_group("linear probe").add_argument
    add("--lrs", type=number(1e-9), nargs="+", help="learning rates, absolute, one head each",
        default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    add("--epochs", type=whole(1), default=100, help="passes over the training images")
    add("--batch-size", type=whole(1), default=1024, help="images per step")
    add("--augment", action="store_true", help="new crops and flips each epoch, as published")
    args, vit, data, train, tests = start(parser)
    if args.shots:
        report_few_labels(args, "linear_top1", train, tests, STRENGTHS,
                          partial(ridge_scores, classes=args.classes))
        return
    fit, choose = held_out(len(train[1]))
    mean, std = train[0][fit].mean(0), train[0][fit].std(0, unbiased=False).clamp_min(1e-6)
    x, y = (train[0] - mean) / std, train[1]
    if args.augment:
        vit.eval()
        labelled = (data.labels >= 0).nonzero().flatten()
        labelled = labelled[~torch.isin(labelled, torch.tensor(sorted(data.unreadable)))]
        batches = (((features - mean) / std, labels)
                   for features, labels in augmented(args, vit, data, labelled[fit]))
    else:
        batches = ((x[i], y[i]) for _, i in orders(fit, args))
    heads = Heads(args.lrs, x.shape[1], args.classes)
    total = args.epochs * math.ceil(len(fit) / args.batch_size)
    bar = tqdm(batches, total=total, disable=None if args.rank == 0 else True)
    for step, (features, labels) in enumerate(bar):
        args.alive()
        heads.step(features, labels, step / total)
    chosen_by = heads.accuracy(x[choose], y[choose])
    top1 = [heads.accuracy((features - mean) / std, labels) for features, labels in tests.values()]
    best = max(range(len(args.lrs)), key=chosen_by.__getitem__)
    rows = list(zip(map(str, args.lrs), chosen_by, *top1))
    each = [accuracies[best] for accuracies in top1]  # one per set of test images
    report(args, [("lr", "held out", *tests)] + rows,
           {"linear_top1": over_strengths(each), "lr": args.lrs[best],
            **per_strength("linear_top1", tests, each),
            "references": len(fit), "tests": len(tests["test"][1])})


if __name__ == "__main__":
    main()
