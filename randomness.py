"""Every random number is a hash of (seed, epoch, index, ..), a function and not a state.

    fold(keys)            -> one number below 2³²
    uniform(count, keys)  -> `count` numbers in [0, 1) for each entry of the keys
    generator(keys)       -> a torch.Generator seeded by that hash

So neither the order of work nor the number of workers or processes changes a sample, and a run
resumes at any step with nothing but that step. Two rounds of a 32-bit xorshift-multiply hash per
number (constants of skeeto/hash-prospector): statistically even, not cryptographic. The key behind
the seed of a training run: 1 order of the images, 2 masks, 3 drop path, 4 masks of pictures, 5
students of later stages.
"""
import torch


def mix(x):
    """One round of a 32-bit hash (xorshift-multiply) in int64: factors < 2³¹ cannot overflow."""
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return x ^ (x >> 15)


def fold(*keys):
    """Hash ints, or int64 tensors, into one number (or tensor of numbers) below 2³²."""
    state = 0
    for key in keys:
        state = mix((state + (key & 0xFFFFFFFF) + 0x9E3779B9) & 0xFFFFFFFF)
    return state


def uniform(count, *keys):
    """`count` numbers in [0, 1) per entry of the keys, ints and int64 tensors (B,): (B, count)."""
    state = torch.as_tensor(fold(*keys)).view(-1, 1)
    slots = torch.arange(1, count + 1, device=state.device)
    return (mix(mix((state + 0x9E3779B9 * slots) & 0xFFFFFFFF)) >> 8).float() / 2**24


def generator(*keys):
    """A torch.Generator on the CPU, seeded by the hash of the keys."""
    return torch.Generator().manual_seed(fold(*keys))
