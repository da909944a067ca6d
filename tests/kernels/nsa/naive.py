"""NSA written from the paper's equations (arXiv 2502.11089), one query and head at a time: slow, and independent.

Takes what sieve.kernels.nsa.api.nsa_attention takes, but documents as a list of lengths. Use it in float64.
"""

import torch


def softmax_over(q, keys, values, scale):
    """q [Dqk], keys [n, Dqk], values [n, Dv] -> o [Dv], lse, weights [n]."""
    s = scale * (keys @ q)
    p = torch.exp(s - s.max())
    p = p / p.sum()
    return p @ values, torch.logsumexp(s, 0), p


def importance(p, j, geometry):
    """Selection block j's share of the compressed weights p (floats): tokens in common, in strides."""
    total = 0.0
    for i, w in enumerate(p):
        low = max(i * geometry.kernel_stride, j * geometry.block_size)
        high = min(i * geometry.kernel_stride + geometry.kernel_size, (j + 1) * geometry.block_size)
        total += w * max(0, high - low) / geometry.kernel_stride
    return total


def choose(scores, current, geometry):
    """Block numbers, ascending: forced ones, then by score, ties to the lower number."""
    forced = [j for j in range(current + 1) if j < geometry.init_blocks or current - j < geometry.local_blocks]
    free = [j for j in range(current + 1) if j not in forced]
    free.sort(key=lambda j: (-scores[j], j))
    return sorted(forced + free[: geometry.topk - len(forced)])


def attention(q, k, v, lengths, scale, window=None):
    """Causal attention by document."""
    group, out, first = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        for t in range(length):
            tokens = slice(first + (0 if window is None else max(0, t - window + 1)), first + t + 1)
            out += [
                softmax_over(q[first + t, h], k[tokens, h // group], v[tokens, h // group], scale)[:2]
                for h in range(q.shape[1])
            ]
        first += length
    return torch.stack([o for o, _ in out]).view(*q.shape[:2], -1), torch.stack([e for _, e in out]).view(*q.shape[:2])


def compressed(q, k_cmp, v_cmp, lengths, geometry, scale):
    """-> o, lse, the importance [T][Hkv] -> list over blocks, and the selected blocks [T][Hkv] -> list."""
    l, d = geometry.kernel_size, geometry.kernel_stride
    H, Hkv = q.shape[1], k_cmp.shape[1]
    group, outs, lses, scores, blocks, first = H // Hkv, [], [], [], [], 0
    for length in lengths:
        for t in range(length):
            seen = [first // d + i for i in range(length) if i * d + l - 1 <= t]
            weights = []
            for h in range(H):
                if seen:
                    o, lse, p = softmax_over(q[first + t, h], k_cmp[seen, h // group], v_cmp[seen, h // group], scale)
                else:
                    o, lse, p = q.new_zeros(v_cmp.shape[2]), q.new_tensor(-torch.inf), q.new_zeros(0)
                outs.append(o)
                lses.append(lse)
                weights.append(p.tolist())
            current = t // geometry.block_size
            members = [weights[g * group : (g + 1) * group] for g in range(Hkv)]
            scores.append([
                [sum(importance(w, j, geometry) for w in ws) for j in range(current + 1)] for ws in members
            ])
            blocks.append([choose(row, current, geometry) for row in scores[-1]])
        first += length
    shape = q.shape[:2]
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape), scores, blocks


def selected(q, k, v, blocks, lengths, geometry, scale):
    group, outs, lses, first = q.shape[1] // k.shape[1], [], [], 0
    for length in lengths:
        for t in range(length):
            for h in range(q.shape[1]):
                g = h // group
                tokens = [first + s for s in range(t + 1) if s // geometry.block_size in blocks[first + t][g]]
                o, lse, _ = softmax_over(q[first + t, h], k[tokens, g], v[tokens, g], scale)
                outs.append(o)
                lses.append(lse)
        first += length
    return torch.stack(outs).view(*q.shape[:2], -1), torch.stack(lses).view(q.shape[:2])


def nsa(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, lengths, geometry, scale, blocks=None):
    """-> out [T, H, Dv], the importance, and the selected blocks; `blocks` puts others in their place."""
    o_cmp, _, scores, chosen = compressed(q, k_cmp, v_cmp, lengths, geometry, scale)
    o_slc, _ = selected(q, k_slc, v_slc, blocks or chosen, lengths, geometry, scale)
    o_win, _ = attention(q, k_win, v_win, lengths, scale, geometry.window_size)
    return gates[..., :1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:] * o_win, scores, chosen


def padded(blocks, topk):
    """Lists of block numbers -> int32 [T, Hkv, topk] with -1 past the last."""
    return torch.tensor([[b + [-1] * (topk - len(b)) for b in row] for row in blocks], dtype=torch.int32)
