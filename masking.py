"""Where the student may not look.

A mask is a bool tensor (B, N), True = hidden from the student, N = gh·gw patches row by row. Every
row hides exactly round(ratio·N) patches, so that the visible ones of a batch form a rectangle
(B, V, D) and can be cut out; with one ratio a row, a tensor (B,), each has its own count. Every
other file refers to this convention.

    random_mask         each patch alike (MAE: He et al. 2021, arXiv 2111.06377)
    block_mask          rectangles, until enough is hidden (BEiT: Bao et al. 2021, arXiv 2106.08254)
    inverse_block_mask  all but one block (CAPI: Darcet et al. 2025, arXiv 2502.08769; no roll)
    attention_mask      what the teacher attends to most (AttMask: Kakogeorgiou et al. 2022,
                        arXiv 2203.12719)

The makers draw from `generator` alone, on its device: equal generators give equal masks.

    python masking.py      # draws one of each
"""
import math

import torch


def hidden_count(ratio, N):
    """round(ratio·N), refusing a ratio outside [0, 1]; of a tensor of ratios (B,), a tensor."""
    low, high = (ratio.min(), ratio.max()) if torch.is_tensor(ratio) else (ratio, ratio)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"mask ratio {ratio} must lie between 0 (all seen) and 1 (all hidden)")
    return (ratio * N).round().long() if torch.is_tensor(ratio) else round(ratio * N)


def hide_highest(scores, ratio):
    """(B, N) scores -> bool mask of so many of the highest of each row. Needs `hidden_count`."""
    count = hidden_count(ratio, scores.shape[1])
    if torch.is_tensor(count):
        ranks = scores.argsort(1, descending=True).argsort(1)
        return ranks < count.to(scores.device).unsqueeze(1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True)


def random_mask(batch, grid, ratio, generator=None, device=None, unit=1):
    """Hide patches drawn uniformly without replacement: grid (gh, gw) -> bool (B, N).

    In squares of unit x unit patches (SimMIM, arXiv 2111.09886: 32 px, two patches of 16), of which
    round(ratio · their number) are hidden. Needs `hide_highest`, `hidden_count`.
    """
    gh, gw = grid
    if gh % unit or gw % unit:
        raise ValueError(f"mask unit {unit} does not divide the grid of {gh} x {gw} patches")
    N = (gh // unit) * (gw // unit)
    scores = torch.rand(batch, N, generator=generator, device=generator and generator.device)
    mask = hide_highest(scores, ratio).to(device)
    mask = mask.view(batch, gh // unit, gw // unit)
    return mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2).flatten(1)


def inside(rows, columns, top, left, height, width):
    """Cells of one rectangle per image: four (B,) tensors -> bool (B, gh, gw)."""
    top, left, height, width = (x.view(-1, 1, 1) for x in (top, left, height, width))
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def block_mask(batch, grid, ratio, generator=None, device=None, min_patches=16, min_aspect=0.3):
    """Hide rectangles (BEiT, algorithm 1): grid (gh, gw) -> bool (B, N).

    Each round draws a rectangle for every image that lacks hidden patches, of at least `min_patches`
    (fewer on small grids: a twelfth of the patches) and as many as are lacking, with aspect ratio
    in [min_aspect, 1 / min_aspect]. As in BEiT's code it is refused where it spans the grid or hides
    more than is lacking. After ten refusals BEiT stops, .5 of 75 short; here one is cut, from a
    random side, to hit the count. What 99 rounds have not reached (ratios near 1) is filled at
    random. Needs `hidden_count`, `inside`.
    """
    (gh, gw), N = grid, grid[0] * grid[1]
    least = max(1, min(min_patches, N // 12))
    mask = torch.zeros(batch, N, dtype=torch.bool, device=generator and generator.device)
    lacking = torch.as_tensor(hidden_count(ratio, N), device=mask.device).repeat(batch)[:batch]
    refused = torch.zeros_like(lacking)
    cell = torch.arange(N, device=mask.device)
    rows, columns = (cell // gw).view(1, gh, gw), (cell % gw).view(1, gh, gw)
    sides = torch.stack([cell, -cell, cell % gw * gh + cell // gw, -(cell % gw * gh + cell // gw)])

    def first(order, count):  # (B, N), (B,): the `count` cells of each row that come first
        return order.argsort(1).argsort(1) < count.unsqueeze(1)

    for _ in range(99):
        at = lacking.nonzero().flatten()  # images
        if not len(at):
            break
        draw = torch.rand(5, batch, generator=generator, device=mask.device)[:, at]
        area = least + draw[0] * (lacking[at] - least)
        aspect = torch.exp((2 * draw[1] - 1) * math.log(1 / min_aspect))  # log-uniform
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < gh) & (width < gw)
        height, width = height.clamp(1, gh), width.clamp(1, gw)
        top = (draw[2] * (gh - height + 1)).floor()
        left = (draw[3] * (gw - width + 1)).floor()
        new = inside(rows, columns, top, left, height, width).flatten(1) & ~mask[at]
        size = new.sum(1)
        taken, late = fits & (size > 0) & (size <= lacking[at]), (refused[at] >= 9) & (size > 0)
        order = sides[(4 * draw[4, late]).long()].masked_fill(~new[late], N)
        new[late] &= first(order, lacking[at[late]])
        new &= (taken | late).unsqueeze(1)
        refused[at] = torch.where(taken | late, 0, refused[at] + 1)
        mask[at] |= new
        lacking[at] -= new.sum(1)
    order = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill(mask, 2)
    return (mask | first(order, lacking)).to(device)


def inverse_block_mask(batch, grid, ratio, generator=None, device=None, min_aspect=0.5):
    """Hide all but one block (CAPI): grid (gh, gw) -> bool (B, N).

    The visible block is a rectangle, its aspect ratio in about [min_aspect, 1 / min_aspect]; where
    the count is no product, the lower end of its last column is missing. Needs `hidden_count`,
    `inside`.
    """
    (gh, gw), N = grid, grid[0] * grid[1]
    visible = N - hidden_count(ratio, N)
    draw = torch.rand(3, batch, generator=generator, device=generator and generator.device)
    rows = torch.arange(gh, device=draw.device).view(1, -1, 1)
    columns = torch.arange(gw, device=draw.device).view(1, 1, -1)
    aspect = torch.exp((2 * draw[0] - 1) * math.log(1 / min_aspect))
    visible = torch.as_tensor(visible, device=draw.device).expand(batch)
    height = (visible * aspect).sqrt().round()
    height = height.clamp(min=(visible / gw).ceil().clamp_min(1)).clamp(max=gh)
    width = -(-visible // height)  # rounded up
    top = (draw[1] * (gh - height + 1)).floor()
    left = (draw[2] * (gw - width + 1)).floor()
    shown = inside(rows, columns, top, left, height, width)
    columnwise = shown.mT.flatten(1)  # (B, gw·gh): count down the columns, cut the last one
    shown = (columnwise & (columnwise.cumsum(1) <= visible.unsqueeze(1))).view(batch, gw, gh).mT
    return ~shown.flatten(1).to(device)


def attention_mask(attention, ratio):
    """Hide the most attended, (B, N) -> bool (B, N). Needs `hide_highest`, `hidden_count`."""
    return hide_highest(attention, ratio)


MASKS = dict(random=random_mask, block=block_mask, inverse_block=inverse_block_mask)


if __name__ == "__main__":
    for name, make in MASKS.items():
        print(f"\n{name}, ratio 0.6")
        for rows in zip(*make(3, (14, 14), 0.6).view(3, 14, 14).tolist()):  # three side by side
            print("   ".join("".join("██" if hidden else "· " for hidden in row) for row in rows))
