"""Which groups of a layer's inputs to remove."""

import numpy as np


def choose_columns(consumers, count, num_groups):
    keep = np.ones(num_groups, bool)
    work = []
    for w, g, labels in consumers:
        g = np.asarray(g, np.float64)
        d = np.diag(g).copy()
        g = g + np.eye(len(g)) * (0.01 * d.mean() + (d == 0))
        work.append([np.asarray(w, np.float64), np.linalg.inv(g), np.asarray(labels)])
    for _ in range(count):
        cost = np.full(num_groups, np.inf)
        for u in np.flatnonzero(keep):
            cost[u] = 0
            for w, inv, labels in work:
                c = np.flatnonzero(labels == u)
                if len(c):
                    cost[u] += np.trace(w[:, c] @ np.linalg.solve(inv[np.ix_(c, c)], w[:, c].T))
        u = int(cost.argmin())
        keep[u] = False
        for e in work:
            w, inv, labels = e
            c = np.flatnonzero(labels == u)
            if len(c):
                s = np.linalg.solve(inv[np.ix_(c, c)], inv[c])
                e[0] = w - w[:, c] @ s
                e[1] = inv - inv[:, c] @ s
                e[0][:, c] = 0
                e[1][c] = 0
                e[1][:, c] = 0
                e[1][c, c] = 1
    return keep
