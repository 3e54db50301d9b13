//! Grouped-query attention (Ainslie et al., 2023, <https://arxiv.org/abs/2305.13245>), causal within each sequence of a
//! packed batch.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use crate::composed;
use crate::composed::padding::{Padded, PlannedPadded};
use crate::cpu;
use crate::dispatch::{of, of_device};
use crate::ranges::{AttentionRanges, Segment};
use crate::spoil::spoilt;
use crate::uploads::{Uploaded, Uploads};

/// How a token's query, key and value are split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; `query / key` query heads share one.
    pub key: usize,
    /// The width of a head.
    pub d: usize,
}

/// Which tokens of a packed batch attend to which, prepared for a device.
#[derive(Debug, Clone, Default)]
pub struct AttentionLayout {
    pub(crate) ranges: Arc<AttentionRanges>,
    padded: Option<Padded>,
    #[cfg(feature = "cube")]
    tiled: Option<crate::gpu::TiledTables>,
}

impl AttentionLayout {
    #[cfg(feature = "cube")]
    pub(crate) fn tiled(&self) -> Option<&crate::gpu::TiledTables> {
        self.tiled.as_ref()
    }

    /// # Panics
    ///
    /// If the layout was prepared for a kernel that reads the ranges.
    pub(crate) fn padded(&self) -> &Padded {
        match &self.padded {
            Some(padded) => padded,
            None => {
                panic!("an attention layout without index tables was used in an autodiff graph")
            }
        }
    }
}

/// An [`AttentionLayout`] whose index tables are about to be copied to the device.
#[derive(Debug)]
pub struct PlannedAttention {
    ranges: Arc<AttentionRanges>,
    padded: Option<PlannedPadded>,
    #[cfg(feature = "cube")]
    tiled: Option<crate::gpu::PlannedTiles>,
}

impl PlannedAttention {
    /// Plans attention between these segments for tensors of type `dtype` on `device`, with a sliding window of `window`
    /// tokens. If scores are stored in memory, at most `scores_at_once` of them at a time.
    pub fn new(
        segments: &[Segment],
        window: Option<usize>,
        heads: Heads,
        dtype: DType,
        device: &Device,
        scores_at_once: usize,
        uploads: &mut Uploads,
    ) -> Self {
        let ranges = AttentionRanges::new(segments, window);
        let reads_ranges = dtype == DType::F32 && of_device(device).attention_reads_ranges();
        #[cfg(feature = "cube")]
        let tiled = crate::gpu::PlannedTiles::new(segments, &ranges, heads, dtype, device, uploads);
        #[cfg(not(feature = "cube"))]
        let tiled: Option<()> = None;
        let padded = (device.is_autodiff() || !(reads_ranges || tiled.is_some()))
            .then(|| PlannedPadded::new(&ranges, heads, scores_at_once, uploads));
        Self {
            padded,
            #[cfg(feature = "cube")]
            tiled,
            ranges: Arc::new(ranges),
        }
    }

    /// The layout where everything was copied to.
    pub fn on_device(self, uploaded: &Uploaded) -> AttentionLayout {
        AttentionLayout {
            ranges: self.ranges,
            padded: self.padded.map(|padded| padded.on_device(uploaded)),
            #[cfg(feature = "cube")]
            tiled: self.tiled.map(|tiled| tiled.on_device(uploaded)),
        }
    }
}

/// What the backward pass of [`attention`] needs.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One per layer, and the large one is the usual one.
pub enum SavedAttention {
    /// For a kernel that recomputes the attention weights from each query's log-sum-exp.
    LogSumExp {
        /// Rotated queries, `[n, heads · d]`.
        q: Tensor<2>,
        /// Rotated keys, `[n, key heads · d]`.
        k: Tensor<2>,
        /// Values, `[n, key heads · d]`.
        v: Tensor<2>,
        /// Each query's log-sum-exp of scores, `[n, heads]`.
        log_sums: Tensor<2>,
    },
    /// For a kernel that recomputes the attention weights, and reads the output to take its part from the gradient.
    #[cfg(feature = "cube")]
    Tiled {
        /// Rotated queries and keys, and values, as above.
        qkv: [Tensor<2>; 3],
        /// The output, `[n, heads · d]`.
        output: Tensor<2>,
        /// Each query's log-sum-exp of scores, `[n, heads]`.
        log_sums: Tensor<2>,
    },
    /// For the composition.
    Padded(Box<composed::attention::Attended>),
}

impl SavedAttention {
    /// The rotated keys and the values of all tokens, `[n, key heads · d]` each.
    pub fn into_keys_values(self) -> [Tensor<2>; 2] {
        match self {
            Self::LogSumExp { k, v, .. } => [k, v],
            #[cfg(feature = "cube")]
            Self::Tiled { qkv: [_, k, v], .. } => [k, v],
            Self::Padded(saved) => saved.into_keys_values(),
        }
    }
}

/// The factor by which queries are multiplied before [`attention`]: 1/√d, or 1 if the kernel scales the scores.
pub fn query_scale(q: &Tensor<2>, heads: Heads) -> f64 {
    of(q).query_scale(heads)
}

/// `softmax(q·kᵀ/√d)·v` within each sequence. Memory grows linearly with the tokens. Also returns what the backward
/// pass needs.
///
/// # Shapes
///
/// - `q`, output: `[n, heads · d]`, the queries rotated and times [`query_scale`]
/// - `k`, `v`: `[n, key heads · d]`, the keys rotated
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    layout: &AttentionLayout,
    heads: Heads,
) -> (Tensor<2>, SavedAttention) {
    let (output, saved) = of(&q).attention(q, k, v, layout, heads);
    (spoilt("attention", output), saved)
}

/// The gradients of `q` (to be multiplied by [`query_scale`]), `k` and `v` from that of the output. Shapes as in
/// [`attention`].
pub fn attention_backward(
    saved: SavedAttention,
    gradient: Tensor<2>,
    layout: &AttentionLayout,
    heads: Heads,
) -> [Tensor<2>; 3] {
    // The forward pass decides: the backward pass needs what it saved.
    let gradients = match saved {
        SavedAttention::LogSumExp { q, k, v, log_sums } => {
            cpu::attention::gradients([q, k, v], log_sums, gradient, &layout.ranges, heads)
        }
        #[cfg(feature = "cube")]
        SavedAttention::Tiled {
            qkv,
            output,
            log_sums,
        } => match layout.tiled() {
            Some(tables) => {
                crate::gpu::attention_backward(qkv, output, log_sums, gradient, tables, heads)
            }
            None => unreachable!("the forward pass had the tables"),
        },
        SavedAttention::Padded(saved) => {
            composed::attention::backward(*saved, gradient, layout.padded(), heads)
        }
    };
    gradients.map(|gradient| spoilt("attention_backward", gradient))
}

/// As [`attention`], in the autodiff graph of `q`, with queries that are not scaled yet.
///
/// # Panics
///
/// If the layout was made for a device outside an autodiff graph.
pub fn attention_in_graph(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    layout: &AttentionLayout,
    heads: Heads,
) -> Tensor<2> {
    composed::attention::forward_in_graph(q, k, v, layout.padded(), heads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, normal};
    use burn::tensor::Int;

    const HEADS: Heads = Heads {
        query: 4,
        key: 2,
        d: 8,
    };

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    fn segments(segments: &[(usize, Option<usize>)]) -> Vec<Segment> {
        let segments = segments.iter().copied();
        segments
            .map(|(length, parent)| Segment { length, parent })
            .collect()
    }

    /// Sequences that share prefixes at two levels, some longer than a tile of queries or a chunk of keys, and the
    /// segments of each sequence.
    fn shared() -> (Vec<Segment>, [Vec<usize>; 5]) {
        let segments = segments(&[
            (20, None),
            (70, Some(0)),
            (3, Some(1)),
            (300, Some(1)),
            (70, Some(0)),
            (1, Some(0)),
            (5, None),
        ]);
        let sequences = [
            vec![0, 1, 2],
            vec![0, 1, 3],
            vec![0, 4],
            vec![6],
            vec![0, 5],
        ];
        (segments, sequences)
    }

    /// A layout whose tiles have at most this many scores.
    fn in_tiles(
        segments: &[Segment],
        window: Option<usize>,
        scores_at_once: usize,
        device: &Device,
    ) -> AttentionLayout {
        let mut uploads = Uploads::default();
        let dtype = DType::F32;
        let planned = PlannedAttention::new(
            segments,
            window,
            HEADS,
            dtype,
            device,
            scores_at_once,
            &mut uploads,
        );
        planned.on_device(&uploads.send(device))
    }

    /// The CPU's kernel and the composition, in tiles and whole, against Burn's autodiff graph.
    #[test]
    fn outputs_and_gradients_are_those_of_the_autodiff_graph() {
        let several = segments(&[(93, None), (390, None), (90, None), (5, None), (21, None)]);
        for (segments, window) in [
            (several.clone(), None),
            (segments(&[(390, None)]), None),
            (shared().0, None),
            (several.clone(), Some(2)),
            (several, Some(50)),
            (segments(&[(390, None)]), Some(260)),
            (shared().0, Some(24)),
            (shared().0, Some(301)),
        ] {
            let n = segments.iter().map(|segment| segment.length).sum();
            let device = Device::flex().autodiff();
            let layout = in_tiles(&segments, window, usize::MAX, &device);
            assert_eq!(layout.padded().tiles.len(), 1);
            let mut rng = CounterRng::new(1);
            let mut random = |width| normal([n, width], 1.5, &mut rng, &device);
            let [q, k, v] = [32, 16, 16].map(|width| random(width).require_grad());
            let gradient = random(32);
            let (a, b, c) = (q.clone(), k.clone(), v.clone());
            let y = attention_in_graph(a, b, c, &layout, HEADS);
            let graph = (y.clone() * gradient.clone()).sum().backward();
            let expected = [&q, &k, &v].map(|x| x.grad(&graph).unwrap());
            let (y, gradient) = (y.inner(), gradient.inner());
            let [q, k, v] = [q, k, v].map(|x| x.inner());
            let check = |got: &[Tensor<2>; 3]| {
                for (got, expected) in got.iter().zip(&expected) {
                    // f32 sums of some hundred products in another order.
                    let distance = distance(got, expected);
                    assert!(distance < 2e-6, "{distance}");
                }
            };

            let (output, saved) = attention(q.clone(), k.clone(), v.clone(), &layout, HEADS);
            assert!(matches!(saved, SavedAttention::LogSumExp { .. }));
            assert!(distance(&output, &y) < 1e-6);
            check(&attention_backward(saved, gradient.clone(), &layout, HEADS));
            // Both variants of the CPU's backward pass; above, the number of threads chose one.
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                let (_, saved) = attention(q.clone(), k.clone(), v.clone(), &layout, HEADS);
                let got =
                    pool.install(|| attention_backward(saved, gradient.clone(), &layout, HEADS));
                check(&got);
            }
            let count = segments.len();
            for (queries, tiles) in [(7, 2), (64, 2), (1000, 1)] {
                let layout = in_tiles(&segments, window, queries * count * 4 * 390, &device);
                let padded = layout.padded();
                assert!(padded.tiles.len() >= tiles);
                let scale = 1.0 / (HEADS.d as f64).sqrt();
                let (a, b, c) = (q.clone().mul_scalar(scale), k.clone(), v.clone());
                let (again, saved) = composed::attention::forward(a, b, c, padded, HEADS);
                assert!(distance(&again, &y) < 1e-6);
                let saved = SavedAttention::Padded(Box::new(saved));
                let [d_q, d_k, d_v] = attention_backward(saved, gradient.clone(), &layout, HEADS);
                check(&[d_q.mul_scalar(scale), d_k, d_v]);
            }
        }
    }

    #[test]
    fn shared_prefixes_change_nothing() {
        let (together, sequences) = shared();
        let starts = crate::starts(&together);
        let tokens =
            |segment: &usize| starts[*segment]..starts[*segment] + together[*segment].length;
        let places: Vec<Vec<usize>> = sequences
            .iter()
            .map(|sequence| sequence.iter().flat_map(tokens).collect())
            .collect();
        let apart = places.iter().map(|places| (places.len(), None));
        let apart = segments(&apart.collect::<Vec<_>>());
        let device = Device::flex();
        let n = together.iter().map(|segment| segment.length).sum();
        let mut rng = CounterRng::new(2);
        let qkv = [32, 16, 16].map(|width| normal([n, width], 1.5, &mut rng, &device));
        let indices: Vec<i32> = places.concat().iter().map(|place| *place as i32).collect();
        let indices = Tensor::<1, Int>::from_data(&indices[..], &device);
        let mut outputs = Vec::new();
        for window in [None, Some(30)] {
            let output = |segments: &[Segment], [q, k, v]: [Tensor<2>; 3]| {
                let layout = in_tiles(segments, window, composed::SCORES_AT_ONCE, &device);
                attention(q, k, v, &layout, HEADS).0
            };
            let shared = output(&together, qkv.clone()).select(0, indices.clone());
            let alone = output(&apart, qkv.clone().map(|x| x.select(0, indices.clone())));
            assert!(distance(&shared, &alone) < 1e-6);
            outputs.push(shared);
        }
        // The window changes something: the sequences are longer.
        assert!(distance(&outputs[0], &outputs[1]) > 0.1);
    }
}
