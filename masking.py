"""Where the student may not look.

A mask is a bool tensor (B, N), True = hidden from the student, N = gh·gw patches row by row. Every
row hides exactly round(ratio·N) patches, so that the visible patches of a batch form a rectangle
(B, V, D) and can be cut out. `ratio` is one number, or a tensor (B,) with one ratio per image.
All other files follow this convention.

    random_mask         single patches (MAE: He et al. 2021, arXiv 2111.06377)
    block_mask          rectangles (BEiT: Bao et al. 2021, arXiv 2106.08254)
    inverse_block_mask  all but one block (CAPI: Darcet et al. 2025, arXiv 2502.08769; no roll)
    attention_mask      the patches with most of the teacher's attention (AttMask: Kakogeorgiou et
                        al. 2022, arXiv 2203.12719; the count rounded, not cut)

The makers draw from `generator` alone, on its device: equal generators give equal masks.

    python masking.py      # draws one of each
"""
import math

import torch


def hidden_count(ratio, N):
    """round(ratio·N): an int, or int64 (B,) for ratios (B,). Refuses ratios outside [0, 1]."""
    several = torch.is_tensor(ratio)
    if not all(0 <= x <= 1 for x in (ratio.tolist() if several else [ratio])):
        raise ValueError(f"mask ratio {ratio} must lie between 0 (all seen) and 1 (all hidden)")
    return (ratio * N).round().long() if several else round(ratio * N)


def attention_mask(attention, ratio):
    """Hide the most attended patches of each row: (B, N) -> bool (B, N). Needs `hidden_count`."""
    count = hidden_count(ratio, attention.shape[1])
    if torch.is_tensor(count):  # a count per row: two sorts, six times slower
        ranks = attention.argsort(1, descending=True).argsort(1)
        return ranks < count.to(attention.device).unsqueeze(1)
    mask = torch.zeros_like(attention, dtype=torch.bool)
    return mask.scatter_(1, attention.topk(count, dim=1, sorted=False).indices, True)


def random_mask(batch, grid, ratio, generator=None, device=None, unit=1):
    """Hide patches drawn uniformly without replacement: grid (gh, gw) -> bool (B, N).

    With `unit` it hides squares of unit x unit patches (SimMIM, arXiv 2111.09886: 32 px, which is
    two patches of 16), exactly round(ratio · their number). Needs `attention_mask`, `hidden_count`.
    """
    gh, gw = grid
    if gh % unit or gw % unit:
        raise ValueError(f"mask unit {unit} does not divide the grid of {gh} x {gw} patches")
    rows, columns = gh // unit, gw // unit
    scores = torch.rand(batch, rows * columns, generator=generator,
                        device=generator and generator.device)
    mask = attention_mask(scores, ratio).to(device).view(batch, rows, columns)
    return mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


def inside(grid, top, left, height, width):
    """The cells of one rectangle per image, given by four tensors (B,) -> bool (B, gh, gw)."""
    top, left, height, width = (x.view(-1, 1, 1) for x in (top, left, height, width))
    row, column = (torch.arange(side, device=top.device) for side in grid)
    row = row.unsqueeze(1)
    return (row >= top) & (row < top + height) & (column >= left) & (column < left + width)


def block_mask(batch, grid, ratio, generator=None, device=None, min_patches=16, min_aspect=0.3):
    """Hide rectangles (BEiT, algorithm 1): grid (gh, gw) -> bool (B, N).

    Each round draws a rectangle for every image that still lacks hidden patches. Its area lies
    between `min_patches` (on small grids a twelfth of the patches) and the number that is lacking,
    its aspect ratio in [min_aspect, 1 / min_aspect]. As in BEiT's code a rectangle is refused if it
    spans the grid or hides too many. After ten refusals BEiT stops, on average .5 of 75 patches
    short; here single patches at random fill the rest. Needs `hidden_count`, `inside`.
    """
    (gh, gw), N = grid, grid[0] * grid[1]
    least = max(1, min(min_patches, N // 12))
    order = torch.rand(batch, N, generator=generator, device=generator and generator.device)
    mask = torch.zeros_like(order, dtype=torch.bool)
    lacking = torch.as_tensor(hidden_count(ratio, N), device=mask.device).expand(batch).clone()
    refused = torch.zeros_like(lacking)
    while len(at := ((lacking > 0) & (refused < 10)).nonzero().flatten()):  # images
        draw = torch.rand(4, batch, generator=generator, device=mask.device)[:, at]
        area = least + draw[0] * (lacking[at] - least)
        aspect = torch.exp((2 * draw[1] - 1) * math.log(1 / min_aspect))  # log-uniform
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < gh) & (width < gw)
        height, width = height.clamp(1, gh), width.clamp(1, gw)
        top = (draw[2] * (gh - height + 1)).floor()
        left = (draw[3] * (gw - width + 1)).floor()
        new = inside(grid, top, left, height, width).flatten(1) & ~mask[at]
        size = new.sum(1)
        taken = fits & (size > 0) & (size <= lacking[at])
        refused[at] = torch.where(taken, 0, refused[at] + 1)
        mask[at] |= new & taken.unsqueeze(1)
        lacking[at] -= torch.where(taken, size, 0)
    ranks = order.masked_fill(mask, 2).argsort(1).argsort(1)
    return (mask | (ranks < lacking.unsqueeze(1))).to(device)


def inverse_block_mask(batch, grid, ratio, generator=None, device=None, min_aspect=0.5):
    """Hide all but one block (CAPI): grid (gh, gw) -> bool (B, N).

    The visible block is a rectangle with an aspect ratio in about [min_aspect, 1 / min_aspect]. If
    the count does not fill it, the lower end of its last column is hidden too.
    Needs `hidden_count`, `inside`.
    """
    (gh, gw), N = grid, grid[0] * grid[1]
    draw = torch.rand(3, batch, generator=generator, device=generator and generator.device)
    visible = torch.as_tensor(N - hidden_count(ratio, N), device=draw.device).expand(batch)
    aspect = torch.exp((2 * draw[0] - 1) * math.log(1 / min_aspect))
    height = (visible * aspect).sqrt().round()
    height = height.clamp(min=(visible / gw).ceil().clamp_min(1)).clamp(max=gh)
    width = -(-visible // height)  # rounded up
    top = (draw[1] * (gh - height + 1)).floor()
    left = (draw[2] * (gw - width + 1)).floor()
    columnwise = inside(grid, top, left, height, width).mT.flatten(1)  # (B, gw·gh)
    shown = columnwise & (columnwise.cumsum(1) <= visible.unsqueeze(1))  # cuts the last column
    return ~shown.view(batch, gw, gh).mT.flatten(1).to(device)


MASKS = dict(random=random_mask, block=block_mask, inverse_block=inverse_block_mask)


if __name__ == "__main__":
    for name, make in MASKS.items():
        print(f"\n{name}, ratio 0.6")
        for rows in zip(*make(3, (14, 14), 0.6).view(3, 14, 14).tolist()):  # three side by side
            print("   ".join("".join("██" if hidden else "· " for hidden in row) for row in rows))
