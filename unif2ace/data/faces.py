"""Photo-real synthetic faces at 64 x 64: nobody's photograph, made when needed, never shipped.

The generator is MobileStyleGAN (OpenVINO IR, 1024 px) from the package `random-face`; only its two networks are used.
A full face takes some 230 ms on two cores, so the synthesis network is cut where it works at 64 x 64 (512 channels),
and a linear read-out turns those channels into RGB. The read-out is a ridge regression fitted on a few full faces
whose 16 x 16 pixel blocks were averaged: 25 dB on faces it was not fitted on. The pictures are therefore slightly
smoothed, slightly less saturated approximations of the generator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from unif2ace.errors import UserError
from unif2ace.packages import package_file

if TYPE_CHECKING:
    import openvino

SIZE = 64
STYLE = 512
PSI = 0.7
REQUIREMENT = "random-face==2021.7.21.1"
SUMS = {
    "data/MappingNetwork.xml": "73e2096cad6e696e4af47df2477e048ab4c42c0e0dec83c7c66604822689e55b",
    "data/MappingNetwork.bin": "212dd716bdb556e18db603ea97300d4fa3c872b878c726b2402fea80820e7305",
    "data/SynthesisNetwork.xml": "7918fce515243954d3e06628cb39a23902d6b1d5d02932cc0c2faee7a2aeeedd",
    "data/SynthesisNetwork.bin": "c7da15fa22d508c82e1c30dd6b4cdf67fe3ccdddaf85b310ee764dbf0c289645",
}

_CUT = "LeakyRelu_442"  # the last layer at 64 x 64, [1, 512, 64, 64]
_CHANNELS = 512
_CENTRE_SEED, _FIT_SEED = 101, 102  # not the faces' seed: the same read-out whatever faces are asked for
_RIDGE = 1e-3


class FaceGenerator:
    """Draws styles and turns them into faces.

    Args:
        psi: truncation. A style is pulled towards the mean style, mean + psi (style - mean): 1 gives the generator's
            whole variety with its failures, 0 the one mean face.
        fit_faces: full faces that the read-out is fitted on (12: 24.2 dB, 24: 24.6, 48: 25.1, 64: 25.2).
        threads: CPU threads.
        progress: show a bar while the read-out is fitted.

    Raises:
        UserError: a package is missing, or a file of it is not the one that was published.
    """

    def __init__(self, psi: float = PSI, fit_faces: int = 48, threads: int = 2, progress: bool = False) -> None:
        if not 0.0 <= psi <= 1.5:
            raise ValueError(f"psi: expected a number in [0, 1.5], got {psi}")
        if fit_faces < 1:
            raise ValueError(f"fit_faces: expected at least 1, got {fit_faces}")
        try:
            import openvino
        except ImportError as error:
            raise UserError("the face generator needs OpenVINO: pip install openvino") from error
        self._openvino = openvino
        self._core = openvino.Core()
        self._streams = max(1, threads)
        self._config = {"INFERENCE_NUM_THREADS": self._streams, "NUM_STREAMS": self._streams}
        found = {name: str(package_file("random_face", name, REQUIREMENT, SUMS)) for name in SUMS}
        self._synthesis_file = found["data/SynthesisNetwork.xml"]
        mapping = self._core.read_model(found["data/MappingNetwork.xml"])
        mapping.reshape([-1, STYLE])
        self._mapping = self._core.compile_model(mapping, "CPU", self._config)
        self._psi = psi
        self._centre = self._map(_CENTRE_SEED, 4096).mean(0)
        self.readout = self._fit(fit_faces, progress)
        self._network = self._core.compile_model(self._with_readout(self.readout), "CPU", self._config)

    def styles(self, count: int, seed: int) -> np.ndarray:
        """Truncated styles [count, 512] float32. The first rows do not depend on `count`."""
        return self._centre + np.float32(self._psi) * (self._map(seed, count) - self._centre)

    def faces(self, styles: np.ndarray, step: Callable[[int], object] = lambda count: None) -> np.ndarray:
        """Faces [N, 64, 64, 3] uint8 RGB of `styles` [N, 512]; `step(1)` is called after each."""
        images = np.empty((len(styles), SIZE, SIZE, 3), np.uint8)
        for index, (rgb,) in self._stream(self._network, styles):
            images[index] = _to_uint8(rgb)
            step(1)
        return images

    def full_face(self, style: np.ndarray) -> np.ndarray:
        """The generator's own face of one style, its pixel blocks averaged down to [64, 64, 3] uint8."""
        network = self._core.compile_model(self._synthesis("img"), "CPU", self._config)
        return _to_uint8(_shrink(network({0: style[None]})[0][0]))

    def _map(self, seed: int, count: int) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal((count, STYLE)).astype(np.float32)
        # 256 rows at a time: the sum order, and so the last bit, must not depend on `count`
        padded = np.concatenate([noise, np.zeros((-count % 256, STYLE), np.float32)])
        parts = [self._mapping({0: padded[i : i + 256]})[0].copy() for i in range(0, len(padded), 256)]
        return np.concatenate(parts)[:count] if parts else noise

    def _synthesis(self, *outputs: str) -> openvino.Model:
        """The synthesis network with the named layers as its outputs."""
        network = self._core.read_model(self._synthesis_file)
        layers = {layer.get_friendly_name(): layer for layer in network.get_ordered_ops()}
        return self._openvino.Model([layers[name].output(0) for name in outputs], network.get_parameters(), "faces")

    def _with_readout(self, readout: np.ndarray) -> openvino.Model:
        """The network up to the cut, then the read-out as a 1 x 1 convolution: three channels leave, not 512."""
        ops = self._openvino.opset13
        network = self._synthesis(_CUT)
        weight = ops.constant(readout[:-1].T.reshape(3, _CHANNELS, 1, 1).astype(np.float32))
        bias = ops.constant(readout[-1].reshape(1, 3, 1, 1).astype(np.float32))
        features = network.outputs[0].get_node().input_value(0)
        rgb = ops.add(ops.convolution(features, weight, [1, 1], [0, 0], [0, 0], [1, 1]), bias)
        return self._openvino.Model([rgb.output(0)], network.get_parameters(), "faces")

    def _stream(self, network: openvino.CompiledModel, styles: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Run `styles` one by one, as many at a time as there are streams, and give the outputs in order."""
        requests = [network.create_infer_request() for _ in range(self._streams)]
        for index in range(len(styles) + self._streams):
            request = requests[index % self._streams]
            done = index - self._streams
            if done >= 0:
                request.wait()
                yield done, [tensor.data[0].copy() for tensor in request.output_tensors]
            if index < len(styles):
                request.start_async({0: styles[index][None]})

    def _fit(self, count: int, progress: bool) -> np.ndarray:
        """Ridge regression from the cut's channels, and a constant, to RGB in [-1, 1]: [513, 3] float64."""
        network = self._core.compile_model(self._synthesis(_CUT, "img"), "CPU", self._config)
        gram = np.zeros((_CHANNELS + 1, _CHANNELS + 1))
        target = np.zeros((_CHANNELS + 1, 3))
        outputs = self._stream(network, self.styles(count, _FIT_SEED))
        for _, (features, image) in tqdm(
            outputs, total=count, desc="fitting the read-out", unit="face", disable=not progress
        ):
            columns = features.reshape(_CHANNELS, -1)
            columns = np.concatenate([columns, np.ones_like(columns[:1])])
            gram += columns @ columns.T
            target += columns @ _shrink(image).reshape(3, -1).T
        penalty = np.full(_CHANNELS + 1, _RIDGE * np.trace(gram[:-1, :-1]) / _CHANNELS)
        penalty[-1] = 0.0
        return np.linalg.solve(gram + np.diag(penalty), target)


def generate_faces(count: int, seed: int = 0, psi: float = PSI, threads: int = 2, progress: bool = True) -> np.ndarray:
    """Make `count` faces, [count, 64, 64, 3] uint8 RGB, the same ones for the same `seed` and `psi` on one machine.

    Raises:
        UserError: a package is missing.
    """
    generator = FaceGenerator(psi, threads=threads, progress=progress)
    with tqdm(total=count, desc="synthetic faces", unit="face", disable=not progress) as bar:
        return generator.faces(generator.styles(count, seed), bar.update)


def _shrink(image: np.ndarray) -> np.ndarray:
    """[3, 1024, 1024] float -> [3, 64, 64], clamped to [-1, 1] first, as the picture would be."""
    block = image.shape[-1] // SIZE
    return np.clip(image, -1, 1).reshape(3, SIZE, block, SIZE, block).mean((2, 4))


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> [H, W, 3] uint8."""
    return np.rint(np.clip(image, -1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(1, 2, 0)
