"""Statistics of data that lies on eight devices, run in a process of its own by test_calibrate."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from tests.calibration.networks import NETWORKS

KINDS = (AxisType.Auto, AxisType.Explicit)
NAMES = ("convolution_plain", "scan", "repeated")


def run():
    """Print, for each network and kind of mesh axes, how far its statistics are from those on one device."""
    for kind in KINDS:
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
        for name in NAMES:
            net = NETWORKS[name]()
            whole = [np.concatenate([x] * (8 // len(x) + 1))[:8] for x in net.batches]
            wanted = jp.calibrate(net.apply, net.params, whole, statistics="gram")
            with jax.set_mesh(mesh):
                batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in whole]
                params = jax.device_put(net.params, NamedSharding(mesh, P()))
                got = jp.calibrate(net.apply, params, batches, statistics="gram")
                far = 0.0
                for path in wanted.paths:
                    pairs = zip(got.layers(path), wanted.layers(path), strict=True)
                    for one, other in ((np.asarray(a.gram), np.asarray(b.gram)) for a, b in pairs):
                        far = max(far, float(np.max(np.abs(one - other)) / np.max(np.abs(other))))
                    np.asarray(got.per_entry(path, "squares"))
            print(kind.name, name, "ok" if far <= 1e-6 else f"FAILED {far:.2g}")
