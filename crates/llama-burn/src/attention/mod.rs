//! Grouped-query attention (Ainslie et al., 2023, <https://arxiv.org/abs/2305.13245>) within packed rows.

mod cpu;
mod padded;

pub use cpu::heads_apart;
pub use padded::SCORES_AT_ONCE;

use burn::module::Module;
use burn::tensor::Tensor;
use lora_core::LoraLinear;
use lora_core::cpu as kernels;

use crate::decoder_layer::DropoutSeeds;
use crate::packed::PackedContext;

/// The attention block of a decoder layer (`self_attn`).
#[derive(Module, Debug)]
#[allow(missing_docs)] // Hugging Face's names.
pub struct Attention {
    pub q_proj: LoraLinear,
    pub k_proj: LoraLinear,
    pub v_proj: LoraLinear,
    pub o_proj: LoraLinear,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
}

/// How a token's query, key and value are split.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads.
    pub(crate) query: usize,
    /// Key and value heads; several query heads share one.
    pub(crate) key: usize,
    /// The width of a head.
    pub(crate) d: usize,
}

impl Attention {
    /// Causal attention of each row to itself, on a tape.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, hidden]`
    /// - output: `[n, hidden]`
    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        context: &PackedContext,
        seeds: &DropoutSeeds,
    ) -> Tensor<2> {
        let (n, heads) = (x.dims()[0], self.heads());
        let q = self.q_proj.forward_seeded(x.clone(), seeds.module(0));
        let k = self.k_proj.forward_seeded(x.clone(), seeds.module(1));
        let v = self.v_proj.forward_seeded(x, seeds.module(2));
        let rotate = |x: Tensor<2>, count: usize| {
            let x = x.reshape([n, count, heads.d]);
            context.angles.rotate(x).reshape([n, count * heads.d])
        };
        let (q, k) = (rotate(q, heads.query), rotate(k, heads.key));
        let mixed = padded::forward_on_tape(q, k, v, context, heads);
        self.o_proj.forward_seeded(mixed, seeds.module(3))
    }

    pub(crate) fn heads(&self) -> Heads {
        Heads {
            query: self.num_attention_heads,
            key: self.num_key_value_heads,
            d: self.head_dim,
        }
    }
}

/// What the backward pass of [`attend`] needs.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One a layer, and the large one is the usual one.
pub(crate) enum Attended {
    /// Of the CPU's kernel.
    Cpu {
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        /// Each query's log-sum-exp of scores, `[n, heads]`.
        log_sums: Tensor<2>,
    },
    /// Of products over padded segments.
    Padded(Box<padded::Attended>),
}

impl Attended {
    pub(crate) fn into_keys_values(self) -> [Tensor<2>; 2] {
        match self {
            Self::Cpu { k, v, .. } => [k, v],
            Self::Padded(attended) => attended.into_keys_values(),
        }
    }
}

/// What queries are multiplied by before [`attend`] gets them: 1 for kernels on the CPU, which scale scores
/// themselves, else 1/√d.
pub(crate) fn score_scale(q: &Tensor<2>, heads: Heads) -> f64 {
    if kernels::is_native(q) {
        1.0
    } else {
        1.0 / (heads.d as f64).sqrt()
    }
}

/// `softmax(q·kᵀ/√d)·v` within rows, outside any tape. Memory grows linearly with the tokens.
///
/// # Shapes
///
/// - `q`, output: `[n, heads · d]`, the queries rotated and times [`score_scale`]
/// - `k`, `v`: `[n, key heads · d]`, the keys rotated
pub(crate) fn attend(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    context: &PackedContext,
    heads: Heads,
) -> (Tensor<2>, Attended) {
    if !kernels::is_native(&q) {
        let (output, attended) = padded::forward(q, k, v, context.padded(), heads);
        return (output, Attended::Padded(Box::new(attended)));
    }
    let n = q.dims()[0];
    let values = [&q, &k, &v].map(|x| kernels::values(x.clone()));
    let (output, log_sums) = cpu::forward(inputs(&values), &context.spans, heads, n);
    let output = kernels::tensor(output, [n, heads.query * heads.d]);
    let log_sums = kernels::tensor(log_sums, [n, heads.query]);
    (output, Attended::Cpu { q, k, v, log_sums })
}

/// The gradients of `q`, before [`score_scale`] a factor short of it, of `k` and of `v` from that of the output.
/// Shapes as in [`attend`].
pub(crate) fn attend_backward(
    attended: Attended,
    gradient: Tensor<2>,
    context: &PackedContext,
    heads: Heads,
) -> [Tensor<2>; 3] {
    let (q, k, v, log_sums) = match attended {
        Attended::Cpu { q, k, v, log_sums } => (q, k, v, log_sums),
        Attended::Padded(attended) => {
            return padded::backward(*attended, gradient, context.padded(), heads);
        }
    };
    let n = q.dims()[0];
    let values = [q, k, v].map(kernels::values);
    let gradients = cpu::backward(
        inputs(&values),
        kernels::values(log_sums).as_slice(),
        kernels::values(gradient).as_slice(),
        &context.spans,
        heads,
    );
    gradients.map(|values| {
        let width = values.len() / n;
        kernels::tensor(values, [n, width])
    })
}

fn inputs([q, k, v]: &[kernels::Values; 3]) -> cpu::Inputs<'_> {
    cpu::Inputs {
        q: q.as_slice(),
        k: k.as_slice(),
        v: v.as_slice(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{PackedContext, PackedTokens, Planned};
    use crate::uploads::Uploads;
    use burn::tensor::{DType, Device};
    use lora_core::{CounterRng, normal};

    const HEADS: Heads = Heads {
        query: 4,
        key: 2,
        d: 8,
    };

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    /// Rows that share beginnings at two levels, some longer than a tile of queries or a piece of keys.
    fn rows() -> Vec<Vec<u32>> {
        let begin: Vec<u32> = (0..90).map(|i| i % 40).collect();
        let row = |kept: usize, own: usize, token: u32| {
            let own = (0..own as u32).map(|i| (token + i) % 48);
            begin[..kept]
                .iter()
                .copied()
                .chain(own)
                .collect::<Vec<u32>>()
        };
        vec![
            row(90, 3, 41),
            row(90, 300, 42),
            row(20, 70, 43),
            row(0, 5, 47),
            row(20, 1, 45),
        ]
    }

    /// A model whose heads are [`HEADS`].
    fn config() -> crate::LlamaConfig {
        crate::LlamaConfig {
            num_attention_heads: HEADS.query,
            num_key_value_heads: HEADS.key,
            head_dim: HEADS.d,
            ..crate::model::tests::config()
        }
    }

    /// A context whose tiles have at most this many scores.
    fn in_tiles(packed: &PackedTokens, scores_at_once: usize, device: &Device) -> PackedContext {
        let mut uploads = Uploads::default();
        let dtype = DType::F32;
        let planned = Planned::new(
            packed,
            &config(),
            dtype,
            device,
            scores_at_once,
            &mut uploads,
        );
        planned.on_device(&uploads.send(device))
    }

    /// The CPU's tiles and the padded products, in tiles and whole, against Burn's tape.
    #[test]
    fn outputs_and_gradients_are_those_of_the_tape() {
        let rows = rows();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        for packed in [
            PackedTokens::from_rows(rows.iter().copied()),
            PackedTokens::from_rows([rows[1]]),
            PackedTokens::sharing_prefixes(&rows, 4).0,
        ] {
            let n = packed.ids.len();
            let device = Device::flex().autodiff();
            let context = in_tiles(&packed, usize::MAX, &device);
            assert_eq!(context.padded().tiles.len(), 1);
            let mut rng = CounterRng::new(1);
            let mut random = |width| normal([n, width], 1.5, &mut rng, &device);
            let [q, k, v] = [32, 16, 16].map(|width| random(width).require_grad());
            let gradient = random(32);
            let (a, b, c) = (q.clone(), k.clone(), v.clone());
            let y = padded::forward_on_tape(a, b, c, &context, HEADS);
            let tape = (y.clone() * gradient.clone()).sum().backward();
            let expected = [&q, &k, &v].map(|x| x.grad(&tape).unwrap());
            let (y, gradient) = (y.inner(), gradient.inner());
            let [q, k, v] = [q, k, v].map(|x| x.inner());
            let check = |got: &[Tensor<2>; 3]| {
                for (got, expected) in got.iter().zip(&expected) {
                    // f32 sums of some hundred products in another order.
                    let distance = distance(got, expected);
                    assert!(distance < 2e-6, "{distance}");
                }
            };

            let (output, attended) = attend(q.clone(), k.clone(), v.clone(), &context, HEADS);
            assert!(matches!(attended, Attended::Cpu { .. }));
            assert!(distance(&output, &y) < 1e-6);
            check(&attend_backward(
                attended,
                gradient.clone(),
                &context,
                HEADS,
            ));
            // Both ways of the CPU's backward pass, whichever the number of threads chose above.
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                let (_, attended) = attend(q.clone(), k.clone(), v.clone(), &context, HEADS);
                let got =
                    pool.install(|| attend_backward(attended, gradient.clone(), &context, HEADS));
                check(&got);
            }
            let segments = packed.segments.len();
            for (queries, tiles) in [(7, 2), (64, 2), (1000, 1)] {
                let context = in_tiles(&packed, queries * segments * 4 * 390, &device);
                let padded = context.padded();
                assert!(padded.tiles.len() >= tiles);
                let scale = 1.0 / (HEADS.d as f64).sqrt();
                let (a, b, c) = (q.clone().mul_scalar(scale), k.clone(), v.clone());
                let (again, attended) = padded::forward(a, b, c, padded, HEADS);
                assert!(distance(&again, &y) < 1e-6);
                let [d_q, d_k, d_v] = padded::backward(attended, gradient.clone(), padded, HEADS);
                check(&[d_q.mul_scalar(scale), d_k, d_v]);
            }
        }
    }

    #[test]
    fn shared_beginnings_change_nothing() {
        let rows = rows();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let (shared, places) = PackedTokens::sharing_prefixes(&rows, 4);
        let apart = PackedTokens::from_rows(rows.iter().copied());
        let device = Device::flex();
        let config = config();
        let n = shared.ids.len();
        let mut rng = CounterRng::new(2);
        let qkv = [32, 16, 16].map(|width| normal([n, width], 1.5, &mut rng, &device));
        let all: Vec<u32> = places.concat();
        let indices = all.iter().map(|place| *place as i32).collect::<Vec<_>>();
        let indices = Tensor::<1, burn::tensor::Int>::from_data(&indices[..], &device);
        let output = |packed: &PackedTokens, [q, k, v]: [Tensor<2>; 3]| {
            let context = PackedContext::new(packed, &config, DType::F32, &device);
            attend(q, k, v, &context, HEADS).0
        };
        let together = output(&shared, qkv.clone()).select(0, indices.clone());
        let alone = output(&apart, qkv.map(|x| x.select(0, indices.clone())));
        assert!(distance(&together, &alone) < 1e-6);
    }
}
