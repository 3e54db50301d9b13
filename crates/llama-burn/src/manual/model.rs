//! What comes before the first layer and after the last.

use burn::module::Param;
use burn::tensor::{DType, Int, Tensor};
use kernels::{SCORES_AT_ONCE, Uploads, frozen_linear_backward};
use lora_core::LinearGroup;

use crate::packed::Planned;
use crate::{Llama, PackedContext, PackedTokens};

/// What passes through the layers start from.
#[derive(Debug, Clone)]
pub struct ManualInputs<const N: usize> {
    /// What every layer needs to know of the batch.
    pub context: PackedContext,
    /// The embeddings, `[n, hidden]`, f32.
    pub hidden: Tensor<2>,
    /// The lists that came along.
    pub indices: [Tensor<1, Int>; N],
}

impl Llama {
    /// As [`embed`](Self::embed), for passes outside an autodiff graph: f32, as hidden states are there.
    ///
    /// # Panics
    ///
    /// As [`embed`](Self::embed).
    pub fn manual_embeddings(&self, ids: &[u32]) -> Tensor<2> {
        self.embedded(ids).without_autodiff().cast(DType::F32)
    }

    /// As [`context`](Self::context), for passes outside an autodiff graph ([`LayerPass`](crate::LayerPass)).
    pub fn manual_context(&self, packed: &PackedTokens) -> PackedContext {
        let device = self.device().without_autodiff();
        PackedContext::new(packed, &self.config, self.dtype(), &device)
    }

    /// A packed batch on the device, ready for passes outside an autodiff graph: its context, its embeddings, and `lists` of
    /// positions or tokens that go along. On a GPU all of it takes two copies from the host.
    ///
    /// # Panics
    ///
    /// As [`embed`](Self::embed).
    pub fn manual_inputs<const N: usize>(
        &self,
        packed: &PackedTokens,
        lists: [&[u32]; N],
    ) -> ManualInputs<N> {
        let device = self.device().without_autodiff();
        let mut uploads = Uploads::default();
        let (dtype, most) = (self.dtype(), SCORES_AT_ONCE);
        let context = Planned::new(packed, &self.config, dtype, &device, most, &mut uploads);
        let rows = self.embed_tokens.planned_rows(&packed.ids, &mut uploads);
        let trained = self.embed_rows.as_ref();
        let trained = trained.map(|rows| (rows, rows.planned(&packed.ids, &mut uploads)));
        let lists = lists.map(|list| uploads.indices(list));
        let uploaded = uploads.send(&device);
        let hidden = self.embed_tokens.rows_at(&rows, &uploaded);
        let hidden = hidden.without_autodiff().cast(DType::F32);
        ManualInputs {
            context: context.on_device(&uploaded),
            hidden: match trained {
                Some((rows, planned)) => rows.put(hidden, &planned, &uploaded),
                None => hidden,
            },
            indices: lists.map(|list| uploaded.ints(&list)),
        }
    }

    /// As [`logits`](Self::logits), outside any autodiff graph. `hidden` is f32.
    pub fn manual_logits(&self, hidden: &Tensor<2>) -> Tensor<2> {
        let (hidden, _) = self.norm.manual_forward(hidden, self.dtype());
        let scores = match (&self.quantized_lm_head[..], &self.lm_head) {
            ([], head) => {
                let table = head.as_ref().unwrap_or(&self.embed_tokens);
                table.logits(hidden.clone())
            }
            (pieces, _) => {
                let scores = pieces.iter().map(|piece| {
                    let ([scores], _) = LinearGroup::new([piece], [None]).forward(&hidden, [None]);
                    scores
                });
                Tensor::cat(scores.collect(), 1)
            }
        };
        let scores = match self.rows_of_head() {
            Some(rows) => rows.scores(hidden.clone(), scores),
            None => scores,
        };
        let scores = match &self.lm_head_adapter {
            Some(adapter) => adapter.manual_forward(&hidden, scores),
            None => scores,
        };
        scores.cast(DType::F32)
    }

    /// The gradient of `hidden` from that of [`manual_logits`](Self::manual_logits)'s output; those of the head's
    /// adapter go to `accumulate`, in f32.
    ///
    /// # Shapes
    ///
    /// - `hidden`, output: `[m, hidden]`, f32
    /// - `gradient`: `[m, vocab]`, f32
    pub fn manual_logits_backward(
        &self,
        hidden: &Tensor<2>,
        gradient: Tensor<2>,
        accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
    ) -> Tensor<2> {
        let dtype = self.dtype();
        let gradient = gradient.cast(dtype);
        let roots = self.norm.inverse_rms(hidden);
        let normalised = || self.norm.again(hidden, &roots, dtype);
        // Held only where it is needed: it is as large as the scores.
        let adapter = self.lm_head_adapter.as_ref();
        let adapter = adapter.map(|adapter| (adapter, gradient.clone()));
        let (gradient, of_rows) = match self.rows_of_head() {
            Some(rows) => {
                let [others, below] = rows.scores_backward(normalised(), gradient, accumulate);
                (others, Some(below))
            }
            None => (gradient, None),
        };
        let through = match (&self.quantized_lm_head[..], &self.lm_head) {
            ([], head) => head
                .as_ref()
                .unwrap_or(&self.embed_tokens)
                .logits_backward(gradient.clone()),
            (pieces, _) => {
                let mut start = 0;
                let mut sum: Option<Tensor<2>> = None;
                for piece in pieces {
                    let rows = piece.dims()[1];
                    let gradient = gradient.clone().narrow(1, start, rows);
                    start += rows;
                    let part = frozen_linear_backward(gradient, piece.weight.base());
                    sum = Some(match sum {
                        Some(sum) => sum + part,
                        None => part,
                    });
                }
                sum.unwrap_or_else(|| hidden.zeros_like())
            }
        };
        let through = match of_rows {
            Some(below) => through + below,
            None => through,
        };
        let through = match adapter {
            Some((adapter, of_all)) => adapter.backward(normalised(), of_all, through, accumulate),
            None => through,
        };
        let (gain, nothing) = (self.norm.gain(), hidden.zeros_like());
        self.norm.backward(hidden, roots, gain, through, nothing)
    }
}
