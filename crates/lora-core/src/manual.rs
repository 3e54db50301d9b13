//! Manual forward and backward passes of LoRA layers, without an autodiff graph.
//!
//! An autodiff graph computes the gradient of every operation separately. The manual passes share the products of
//! layers with the same input, accumulate sums in place, save only what the backward pass reads, and fix the order of
//! every sum. The mathematics is that of [`LoraLinear::forward`]; the tests compare with Burn's autodiff graph.
//!
//! For `h = x·W₀ + γ·(x·A)·B` and the gradient G of h (Hu et al., 2021,
//! <https://arxiv.org/abs/2106.09685>): ∂A = γ·xᵀ·(G·Bᵀ), ∂B = γ·(x·A)ᵀ·G, ∂x = G·W₀ᵀ + γ·(G·Bᵀ)·Aᵀ.
//!
//! A method that scales each output of h by a factor f: ∂f = Σ G ⊙ h over the rows, and G ⊙ f replaces G everywhere
//! else. What f, A and B are made of is the method's ([`Adapter`]).

use burn::tensor::{DType, Tensor};

use kernels::{
    Direction, JointTerm, LowRankPart, LowRankTerm, Normalized, adapted_product, frozen_product,
    gated_product, gated_product_backward, joint_product, low_rank_columns, low_rank_gradients,
    low_rank_gradients_of_norm, multiply_add, multiply_in_f32, product, swiglu, swiglu_backward,
    transposes_low_rank,
};

use crate::LoraLinear;
use crate::method::{Accumulate, Adapter, Scaling};
use crate::whole::Input;

/// The input of a group in its backward pass: a tensor that is computed again, if it is needed at all.
pub trait LinearInput {
    /// The input, `[n, d_in]`.
    fn tensor(self) -> Tensor<2>;

    /// The input as the output of an RMSNorm, for kernels that need not have it in memory.
    fn normalized(&self) -> Option<Normalized> {
        None
    }
}

impl<F: FnOnce() -> Tensor<2>> LinearInput for F {
    fn tensor(self) -> Tensor<2> {
        self()
    }
}

/// Layers with the same input, run together outside an autodiff graph.
///
/// Weights and biases get a gradient only if they require one ([`Trained`](crate::Trained)).
#[derive(Debug, Clone)]
pub struct LinearGroup<'a, const N: usize> {
    pub(crate) layers: [&'a LoraLinear; N],
    adapters: [Option<Adapted<'a>>; N],
    dropout_seeds: [Option<u64>; N],
}

/// A layer's adapter and its factors in their own type, outside an autodiff graph.
#[derive(Debug, Clone)]
struct Adapted<'a> {
    adapter: &'a dyn Adapter,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
    rank: usize,
}

impl<'a> Adapted<'a> {
    fn new(adapter: &'a dyn Adapter) -> Self {
        let [a, b] = adapter.detached_factors();
        Self {
            adapter,
            a,
            b,
            scale: adapter.scale(),
            rank: adapter.rank(),
        }
    }
}

/// What a forward pass saves for the backward pass: the adapters' hidden activations γ·x·A, `[n, r]` each, and for
/// outputs that are scaled the output before its scaling, `[n, d_out]`.
#[derive(Debug, Clone)]
pub struct LowRank<const N: usize> {
    products: [Option<LowRankPart>; N],
    scaled: [Option<Scaled>; N],
    /// The adapters' A side by side, `[d_in, Σ r]`, if all share one product with the input. On GPUs multiplied by γ if
    /// all adapters have the same γ.
    all_a: Option<Tensor<2>>,
    /// The hidden activations of all adapters side by side, `[n, Σ r]`, if one kernel computed them.
    grouped: Option<Tensor<2>>,
}

/// An output before its scaling, and the scaling.
#[derive(Debug, Clone)]
struct Scaled {
    output: Tensor<2>,
    scaling: Scaling,
}

impl<'a, const N: usize> LinearGroup<'a, N> {
    /// A group of layers. With seeds the layers' dropout acts, as in [`LoraLinear::forward_seeded`].
    pub fn new(layers: [&'a LoraLinear; N], dropout_seeds: [Option<u64>; N]) -> Self {
        Self {
            layers,
            adapters: layers.map(|layer| layer.adapter().map(Adapted::new)),
            dropout_seeds,
        }
    }

    /// Whether a layer has an adapter, so that the backward pass needs the input.
    pub fn has_adapters(&self) -> bool {
        self.adapters.iter().any(Option::is_some)
    }

    /// The outputs, each added to its entry of `sums` if there is one. An output has the type of its sum, or without a
    /// sum the type of `x`, in which products are computed. See also [`forward_gated`](LinearGroup::forward_gated).
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, d_in]`
    /// - `sums`, outputs: `[n, d_out]` of each layer
    ///
    /// # Panics
    ///
    /// If the shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor<2>,
        sums: [Option<Tensor<2>>; N],
    ) -> ([Tensor<2>; N], LowRank<N>) {
        let (outputs, saved, _) = self.forward_with(x, sums, false);
        (outputs, saved)
    }

    /// As [`forward`](Self::forward). With `gates`, the first output is SwiGLU's gate and the last one its up, and
    /// SwiGLU's output is returned if the last product computed it.
    fn forward_with(
        &self,
        x: &Tensor<2>,
        mut sums: [Option<Tensor<2>>; N],
        gates: bool,
    ) -> ([Tensor<2>; N], LowRank<N>, Option<Tensor<2>>) {
        let grouped = (self.has_adapters() && !self.drops())
            .then(|| self.grouped_low_rank(x))
            .flatten();
        let (products, all_a) = match &grouped {
            Some(all) => (self.parts(all), None),
            None => self.low_rank(x),
        };
        let mut scaled = [const { None }; N];
        let (mut gate, mut gated) = (None, None);
        let outputs = std::array::from_fn(|i| {
            let layer = self.layers[i];
            let weight = layer.weight_in(x.dtype());
            let sum = sums[i].take();
            let adapted = self.adapters[i].as_ref();
            let scaling = adapted.and_then(|adapted| adapted.adapter.scaling(&weight));
            let mut y = match (&products[i], adapted, scaling) {
                (Some(xa), Some(adapted), Some(scaling)) => {
                    let b = adapted.b.clone().cast(x.dtype());
                    let by = scaling.factor.clone().cast(x.dtype());
                    let dropped = self.dropped(i, x.clone());
                    let dropped_base =
                        frozen_product(None, dropped, weight.clone(), Direction::Forward);
                    // Under dropout the base layer gets the whole input, the scaled part the dropped one.
                    let undropped = self.drops_in(i).then(|| {
                        let base = frozen_product(None, x.clone(), weight, Direction::Forward);
                        base - dropped_base.clone()
                    });
                    let xa = xa.clone().of_layer().cast(x.dtype());
                    let output = multiply_add(Some(dropped_base), 1.0, xa, b);
                    let y = output.clone() * by;
                    scaled[i] = Some(Scaled { output, scaling });
                    let y = match undropped {
                        Some(undropped) => y + undropped,
                        None => y,
                    };
                    match sum {
                        Some(sum) => {
                            let dtype = sum.dtype();
                            sum + y.cast(dtype)
                        }
                        None => y,
                    }
                }
                (xa, adapted, _) => {
                    let low_rank = xa.clone().zip(adapted);
                    let low_rank = low_rank.map(|(low, adapted)| LowRankTerm {
                        low,
                        b: adapted.b.clone(),
                    });
                    match gate.as_ref().filter(|_| !layer.adds_bias() && i + 1 == N) {
                        Some(gate) => {
                            let (up, output) = gated_product(gate, x.clone(), weight, low_rank);
                            gated = Some(output);
                            up
                        }
                        None => {
                            adapted_product(sum, x.clone(), weight, low_rank, Direction::Forward)
                        }
                    }
                }
            };
            if let Some(bias) = layer.added_bias(y.dtype()) {
                y = y + bias.unsqueeze();
            }
            if gates && i == 0 {
                gate = Some(y.clone());
            }
            y
        });
        let saved = LowRank {
            products,
            scaled,
            all_a,
            grouped,
        };
        (outputs, saved, gated)
    }

    /// Computes the gradients of the adapters and of what else is trained, each passed to `accumulate` in f32. Returns
    /// the gradient of `x` if `input_gradient` is set.
    ///
    /// `x` is read only if [`reads_input`](Self::reads_input), because it may compute the input again. `saved` comes from
    /// [`forward`](Self::forward). See also [`backward_gated`](LinearGroup::backward_gated).
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n, d_in]`
    /// - `d_outputs`: `[n, d_out]` of each layer
    pub fn backward(
        &self,
        x: impl LinearInput,
        saved: LowRank<N>,
        d_outputs: [Tensor<2>; N],
        input_gradient: bool,
        accumulate: &mut Accumulate<'_>,
    ) -> Option<Tensor<2>> {
        let products =
            |low: Option<&Tensor<2>>, terms| joint_product(low, terms, Direction::Backward);
        self.backward_with(x, saved, d_outputs, input_gradient, products, accumulate)
    }

    /// As [`backward`](Self::backward). `products` returns the sum of the products with the frozen weights, as
    /// [`joint_product`]. Unless there is dropout, its result is returned.
    fn backward_with(
        &self,
        x: impl LinearInput,
        saved: LowRank<N>,
        d_outputs: [Tensor<2>; N],
        input_gradient: bool,
        products: impl FnOnce(Option<&Tensor<2>>, Vec<JointTerm>) -> Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) -> Option<Tensor<2>> {
        let dtype = d_outputs[0].dtype();
        let x = if self.trains_weight() {
            Input::Known(x.tensor())
        } else {
            Input::Later(x)
        };
        self.gradients_of_whole(x.known(), &d_outputs, accumulate);
        // Under dropout, the gradients of scaled outputs before the scaling: the base layer's undropped part is not
        // scaled.
        let mut d_unscaled: [Option<Tensor<2>>; N] = [const { None }; N];
        let d_outputs: [Tensor<2>; N] = {
            let mut index = 0;
            d_outputs.map(|d_output| {
                let i = index;
                index += 1;
                let (Some(adapted), Some(scaled)) = (&self.adapters[i], &saved.scaled[i]) else {
                    return d_output;
                };
                let product =
                    d_output.clone().cast(DType::F32) * scaled.output.clone().cast(DType::F32);
                let d_factor = product.sum_dim(0);
                let scaling = &scaled.scaling;
                adapted
                    .adapter
                    .gradient_of_scaling(scaling, d_factor, accumulate);
                let d_scaled = d_output.clone() * scaled.scaling.factor.clone().cast(dtype);
                if self.drops_in(i) {
                    d_unscaled[i] = Some(d_output);
                }
                d_scaled
            })
        };
        self.gradients_of_b(&saved, &d_outputs, accumulate);
        let low_gradients = if self.drops() {
            LowGradients::Apart(std::array::from_fn(|i| {
                let adapted = self.adapters[i].as_ref()?;
                let b = adapted.b.clone().cast(dtype).transpose();
                Some(multiply_add(None, adapted.scale, d_outputs[i].clone(), b))
            }))
        } else {
            match self.grouped_low_gradients(&d_outputs) {
                Some(all) => LowGradients::Grouped(all),
                None => LowGradients::Together(self.low_gradients(&d_outputs, dtype)),
            }
        };
        let mut d_input = None;
        // The gradients of the dropped inputs, before the dropout mask.
        let mut d_dropped: [Option<Tensor<2>>; N] = [const { None }; N];
        if input_gradient {
            let (low, mut low_rank) = self.low_rank_terms(&low_gradients, saved.all_a, dtype);
            let d_outputs = d_outputs.into_iter().enumerate();
            let terms = d_outputs.map(|(i, d_output)| {
                let weight = self.layers[i].weight_in(dtype);
                let x = match d_unscaled[i].take() {
                    None => d_output,
                    Some(d_base) => {
                        let x = d_output - d_base.clone();
                        let product = frozen_product(None, x, weight.clone(), Direction::Backward);
                        d_dropped[i] = Some(product);
                        d_base
                    }
                };
                JointTerm {
                    x,
                    weight,
                    low_rank: low_rank[i].take(),
                }
            });
            let terms = terms.collect();
            d_input = Some(products(low.as_ref(), terms));
        }
        if self.has_adapters() {
            match low_gradients {
                LowGradients::Together(_) | LowGradients::Grouped(_) if !self.trains_a() => {}
                LowGradients::Together(Some(all)) => {
                    self.shared_backward(x.tensor(), all, accumulate);
                }
                LowGradients::Together(None) => {}
                LowGradients::Grouped(all) => self.grouped_backward(x, &all, accumulate),
                LowGradients::Apart(all) => {
                    self.dropped_backward(x.tensor(), all, d_dropped, &mut d_input, accumulate);
                }
            }
        }
        d_input
    }

    /// The adapters' part of the gradient of the input: the columns of low rank, and per layer the first of its columns
    /// with Aᵀ. The last layer's product adds what all adapters share. Under dropout there is none.
    #[allow(clippy::type_complexity)]
    fn low_rank_terms(
        &self,
        gradients: &LowGradients<N>,
        all_a: Option<Tensor<2>>,
        dtype: DType,
    ) -> (Option<Tensor<2>>, [Option<(usize, Tensor<2>)>; N]) {
        let mut terms = [const { None }; N];
        match gradients {
            LowGradients::Together(Some(all)) => {
                let transposed = transposes_low_rank(all);
                let all = all.clone();
                let all = if transposed { all.transpose() } else { all };
                // On GPUs `all_a` has the factor γ that `all` lacks.
                let a = all_a.unwrap_or_else(|| self.all_a(dtype));
                terms[N - 1] = Some((0, a.transpose()));
                (Some(all), terms)
            }
            LowGradients::Grouped(all) => {
                let adapted = self.adapters.iter().zip(self.parts(all));
                for (term, (adapted, part)) in terms.iter_mut().zip(adapted) {
                    let own = adapted.as_ref().zip(part);
                    *term = own.map(|(adapted, part)| (part.first, adapted.a.clone().transpose()));
                }
                (Some(all.clone()), terms)
            }
            _ => (None, terms),
        }
    }

    /// The gradients of B.
    fn gradients_of_b(
        &self,
        saved: &LowRank<N>,
        d_outputs: &[Tensor<2>; N],
        accumulate: &mut Accumulate<'_>,
    ) {
        let adapted = || {
            let layers = self.adapters.iter().zip(&saved.products).zip(d_outputs);
            layers.filter_map(|((adapted, low), d_output)| {
                Some((adapted.as_ref()?, low.as_ref()?, d_output))
            })
        };
        // One kernel for all layers whose columns lie side by side.
        let grouped = saved.grouped.as_ref().and_then(|all| {
            let wide: Vec<_> = adapted().map(|(_, _, d_output)| d_output.clone()).collect();
            let ranks: Vec<_> = adapted().map(|(_, low, _)| low.rank).collect();
            low_rank_gradients(all, &wide, &ranks, false)
        });
        let mut grouped = grouped.map(Vec::into_iter);
        for (adapted, low, d_output) in adapted() {
            let d_b = match grouped.as_mut().and_then(Iterator::next) {
                Some(d_b) => d_b,
                None => {
                    let low = low.clone().of_layer().cast(d_output.dtype());
                    multiply_in_f32(low.transpose(), d_output.clone())
                }
            };
            adapted.adapter.gradient_of_b(d_b, accumulate);
        }
    }

    /// The layers' parts of columns of low rank that lie side by side.
    fn parts(&self, all: &Tensor<2>) -> [Option<LowRankPart>; N] {
        let mut first = 0;
        std::array::from_fn(|i| {
            let rank = self.adapters[i].as_ref()?.rank;
            first += rank;
            Some(LowRankPart {
                all: all.clone(),
                first: first - rank,
                rank,
            })
        })
    }

    /// The adapters that there are.
    fn adapted(&self) -> impl Iterator<Item = &Adapted<'a>> {
        self.adapters.iter().flatten()
    }

    /// γ·x·A of every adapter side by side, if the device has a kernel for all of them.
    fn grouped_low_rank(&self, x: &Tensor<2>) -> Option<Tensor<2>> {
        let factors: Vec<_> = self.adapted().map(|adapted| adapted.a.clone()).collect();
        let scales: Vec<_> = self.adapted().map(|adapted| adapted.scale).collect();
        low_rank_columns(&vec![x.clone(); factors.len()], &factors, false, &scales)
    }

    /// γ·G·Bᵀ of every adapter side by side, if the device has a kernel for all of them.
    fn grouped_low_gradients(&self, d_outputs: &[Tensor<2>; N]) -> Option<Tensor<2>> {
        let adapted = self.adapters.iter().zip(d_outputs);
        let adapted = adapted.filter(|(adapted, _)| adapted.is_some());
        let wide: Vec<_> = adapted.map(|(_, d_output)| d_output.clone()).collect();
        let factors: Vec<_> = self.adapted().map(|adapted| adapted.b.clone()).collect();
        let scales: Vec<_> = self.adapted().map(|adapted| adapted.scale).collect();
        low_rank_columns(&wide, &factors, true, &scales)
    }

    /// The gradients of A from [`grouped_low_gradients`](Self::grouped_low_gradients).
    fn grouped_backward(
        &self,
        x: impl LinearInput,
        all: &Tensor<2>,
        accumulate: &mut Accumulate<'_>,
    ) {
        let ranks: Vec<usize> = self.adapted().map(|adapted| adapted.rank).collect();
        let normalized = x.normalized();
        let gradients = normalized
            .and_then(|normalized| low_rank_gradients_of_norm(all, &normalized, &ranks))
            .or_else(|| low_rank_gradients(all, &vec![x.tensor(); ranks.len()], &ranks, true));
        let gradients = gradients.unwrap_or_else(|| unreachable!("the device has the kernels"));
        for (adapted, d_a) in self.adapted().zip(gradients) {
            adapted.adapter.gradient_of_a(d_a, accumulate);
        }
    }

    /// γ·x·A of every adapter, in one product for all of them unless each has its own dropout mask. Also returns the
    /// `all_a` of [`LowRank`].
    fn low_rank(&self, x: &Tensor<2>) -> ([Option<LowRankPart>; N], Option<Tensor<2>>) {
        if !self.has_adapters() {
            return ([const { None }; N], None);
        }
        if self.drops() {
            let apart = std::array::from_fn(|i| {
                let adapted = self.adapters[i].as_ref()?;
                let a = adapted.a.clone().cast(x.dtype());
                let dropped = self.dropped(i, x.clone());
                let xa = multiply_add(None, adapted.scale, dropped, a);
                Some(LowRankPart::whole(xa))
            });
            return (apart, None);
        }
        let scale = self.common_scale();
        let (xa, all_a) = if transposes_low_rank(x) {
            // Transposed, so that each adapter's part is contiguous.
            let all_a = scaled(self.all_a(x.dtype()), scale);
            let xa = product(all_a.clone().transpose(), x.clone().transpose());
            (xa, all_a)
        } else {
            let all_a = self.all_a(x.dtype());
            let xa = multiply_add(None, scale.unwrap_or(1.0), x.clone(), all_a.clone());
            (xa, all_a)
        };
        let mut start = 0;
        let products = std::array::from_fn(|i| {
            let adapted = self.adapters[i].as_ref()?;
            let r = adapted.rank;
            start += r;
            let xa = if transposes_low_rank(x) {
                xa.clone().narrow(0, start - r, r).transpose()
            } else {
                xa.clone().narrow(1, start - r, r)
            };
            Some(LowRankPart::whole(match scale {
                Some(_) => xa,
                None => xa.mul_scalar(adapted.scale),
            }))
        });
        // A factor that is not trained is put side by side again in the backward pass: memory of a whole model's A.
        let keeps = self.trains_a() || scale != Some(1.0);
        (products, keeps.then_some(all_a))
    }

    /// Whether an adapter's A is trained.
    fn trains_a(&self) -> bool {
        self.adapted().any(|adapted| adapted.adapter.trains_a())
    }

    /// γ·G·Bᵀ of every adapter side by side: `[n, Σ r]`. With [`transposes_low_rank`] it is transposed, `[Σ r, n]`, and
    /// has no factor γ if all adapters have the same γ.
    fn low_gradients(&self, d_outputs: &[Tensor<2>; N], dtype: DType) -> Option<Tensor<2>> {
        let transposed = transposes_low_rank(&d_outputs[0]);
        let common = self.common_scale().is_some();
        let parts = self
            .adapters
            .iter()
            .zip(d_outputs)
            .filter_map(|(adapted, d_output)| {
                let adapted = adapted.as_ref()?;
                let b = adapted.b.clone().cast(dtype);
                Some(if transposed {
                    let part = product(b, d_output.clone().transpose());
                    scaled(part, (!common).then_some(adapted.scale))
                } else {
                    multiply_add(None, adapted.scale, d_output.clone(), b.transpose())
                })
            });
        let mut parts: Vec<Tensor<2>> = parts.collect();
        Some(match parts.len() {
            0 => return None,
            1 => parts.remove(0),
            _ => Tensor::cat(parts, if transposed { 0 } else { 1 }),
        })
    }

    /// The scale γ of all adapters, if they have the same.
    fn common_scale(&self) -> Option<f64> {
        let mut scales = self.adapted().map(|adapted| adapted.scale);
        let first = scales.next()?;
        scales.all(|scale| scale == first).then_some(first)
    }

    /// The adapters' A side by side, `[d_in, Σ r]`.
    fn all_a(&self, dtype: DType) -> Tensor<2> {
        let all = self.adapted().map(|adapted| adapted.a.clone().cast(dtype));
        let mut all: Vec<_> = all.collect();
        match all.len() {
            1 => all.remove(0),
            _ => Tensor::cat(all, 1),
        }
    }

    /// The gradients of A, for adapters that share their input. `all` is the result of
    /// [`low_gradients`](Self::low_gradients).
    fn shared_backward(&self, x: Tensor<2>, all: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        let transposed = transposes_low_rank(&x);
        let d_all_a = if transposed {
            scaled(multiply_in_f32(all, x), self.common_scale())
        } else {
            multiply_in_f32(x.transpose(), all)
        };
        let mut start = 0;
        for adapted in self.adapted() {
            let r = adapted.rank;
            let d_a = if transposed {
                d_all_a.clone().narrow(0, start, r).transpose()
            } else {
                d_all_a.clone().narrow(1, start, r)
            };
            adapted.adapter.gradient_of_a(d_a, accumulate);
            start += r;
        }
    }

    /// As [`shared_backward`](Self::shared_backward), for adapters with a dropout mask each. `d_dropped` is the base
    /// layers' part of the dropped inputs' gradients.
    fn dropped_backward(
        &self,
        x: Tensor<2>,
        low_gradients: [Option<Tensor<2>>; N],
        mut d_dropped: [Option<Tensor<2>>; N],
        d_input: &mut Option<Tensor<2>>,
        accumulate: &mut Accumulate<'_>,
    ) {
        for (i, gradient) in low_gradients.into_iter().enumerate() {
            let (Some(gradient), Some(adapted)) = (gradient, &self.adapters[i]) else {
                continue;
            };
            if adapted.adapter.trains_a() {
                let dropped = self.dropped(i, x.clone());
                let d_a = multiply_in_f32(dropped.transpose(), gradient.clone());
                adapted.adapter.gradient_of_a(d_a, accumulate);
            }
            if let Some(sum) = d_input.take() {
                let a = adapted.a.clone().cast(x.dtype()).transpose();
                let d_dropped = multiply_add(d_dropped[i].take(), 1.0, gradient, a);
                // The backward pass of a dropout mask is the same multiplication as its forward pass.
                *d_input = Some(sum + self.dropped(i, d_dropped));
            }
        }
    }

    fn drops(&self) -> bool {
        (0..N).any(|layer| self.drops_in(layer))
    }

    fn drops_in(&self, layer: usize) -> bool {
        self.dropout_seeds[layer].is_some() && self.layers[layer].dropout.prob > 0.0
    }

    /// `x` times a layer's dropout mask, which its seed fixes.
    fn dropped(&self, layer: usize, x: Tensor<2>) -> Tensor<2> {
        match self.dropout_seeds[layer] {
            Some(seed) => self.layers[layer].dropout.forward(x, Some(seed)),
            None => x,
        }
    }
}

/// The gradients of the adapters' hidden activations x·A.
#[allow(clippy::large_enum_variant)] // It lives for a few lines.
enum LowGradients<const N: usize> {
    /// Of all adapters in one tensor, because they share their input.
    Together(Option<Tensor<2>>),
    /// The same, `[n, Σ r]`, by one kernel for all adapters.
    Grouped(Tensor<2>),
    /// Of each adapter, under dropout.
    Apart([Option<Tensor<2>>; N]),
}

fn scaled(x: Tensor<2>, scale: Option<f64>) -> Tensor<2> {
    match scale {
        Some(scale) if scale != 1.0 => x.mul_scalar(scale),
        _ => x,
    }
}

/// The layers of a feed-forward block with SwiGLU.
impl LinearGroup<'_, 2> {
    /// The gate, up and SwiGLU's output `silu(gate) · up` of a group of both layers. On GPUs SwiGLU is part of up's
    /// product.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n, d_in]`
    /// - outputs: `[n, intermediate]`
    pub fn forward_gated(&self, x: &Tensor<2>) -> ([Tensor<2>; 3], LowRank<2>) {
        let ([gate, up], saved, gated) = self.forward_with(x, [None, None], true);
        let output = gated.unwrap_or_else(|| swiglu(&gate, &up));
        ([gate, up, output], saved)
    }
}

impl LinearGroup<'_, 1> {
    /// As [`backward`](Self::backward) for a layer whose input is SwiGLU's output. Returns the gradients of `gate` and
    /// `up`, in their memory if it is not shared. On GPUs SwiGLU's backward pass is part of the product.
    ///
    /// # Shapes
    ///
    /// - `gate`, `up`, outputs: `[n, d_in]`
    /// - `d_output`: `[n, d_out]`
    pub fn backward_gated(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        saved: LowRank<1>,
        d_output: Tensor<2>,
        input_gradient: bool,
        accumulate: &mut Accumulate<'_>,
    ) -> Option<(Tensor<2>, Tensor<2>)> {
        // Computed before the gradients take the place of gate and up.
        let input = self.reads_input().then(|| swiglu(&gate, &up));
        let input = || input.unwrap_or_else(|| unreachable!("computed if it is read"));
        if self.drops() {
            // Dropout changes the gradient after the product.
            let d_input = self.backward(input, saved, [d_output], input_gradient, accumulate)?;
            return Some(swiglu_backward(gate, up, d_input));
        }
        let mut d_gate = None;
        let product = |low: Option<&Tensor<2>>, terms: Vec<JointTerm>| {
            let term = terms.into_iter().next();
            let term = term.unwrap_or_else(|| unreachable!("a group of one layer"));
            let (d_output, weight, low_rank) = term.apart(low);
            let gradients = gated_product_backward(gate, up, d_output, weight, low_rank);
            d_gate = Some(gradients.0);
            gradients.1
        };
        let d_outputs = [d_output];
        let d_up =
            self.backward_with(input, saved, d_outputs, input_gradient, product, accumulate)?;
        Some((d_gate?, d_up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdapterDropout, Method};
    use burn::module::ParamId;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use kernels::{CounterRng, Quantization, normal};
    use std::collections::HashMap;

    fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
        normal(shape, 0.3, &mut CounterRng::new(seed), device)
    }

    /// Three layers of different widths and ranks, the second without an adapter, one with a bias. The first and the third
    /// have these methods.
    fn layers(
        device: &Device,
        quantization: Quantization,
        dropout: f64,
        [first, third]: [Method; 2],
    ) -> [LoraLinear; 3] {
        let layer = |d_out: usize, r: usize, bias: bool, method: Method| {
            let linear = LinearConfig::new(64, d_out).with_bias(bias).init(device);
            let mut layer = LoraLinear::frozen(linear);
            layer.dropout = AdapterDropout::new(dropout);
            layer = layer.quantize(quantization).unwrap();
            if r > 0 {
                // Shared matrices are wider than the layer.
                let wider = if method.facts().shared.is_some() {
                    16
                } else {
                    0
                };
                let a = random([64 + wider, r], 1, device);
                let b = random([r, d_out + wider], 2, device);
                let vectors = method.facts().vectors.iter();
                let vectors = vectors
                    .map(|vector| random([1, vector.length(r, d_out)], 8, device).add_scalar(2.0));
                let vectors = Some(vectors.collect());
                layer = layer.with_adapter_of(method, [a, b], 1.5, vectors).unwrap();
            }
            layer
        };
        [
            layer(96, 4, true, first),
            layer(32, 0, false, first),
            layer(64, 7, false, third),
        ]
    }

    fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
        let norm = |x: Tensor<2>| x.powf_scalar(2.0).sum().sqrt().into_scalar::<f32>();
        norm(a.clone() - b.clone()) / norm(b.clone())
    }

    #[test]
    fn outputs_and_gradients_are_those_of_the_autodiff_graph() {
        let device = Device::flex().autodiff();
        for quantization in [Quantization::None, Quantization::Bits8] {
            for (dropout, methods) in [
                (0.0, [Method::Lora, Method::Lora]),
                (0.3, [Method::Lora, Method::Lora]),
                (0.0, [Method::Dora, Method::Lora]),
                (0.3, [Method::Dora, Method::Lora]),
                (0.0, [Method::Vera, Method::Lora]),
                (0.0, [Method::Vera, Method::Vera]),
                (0.3, [Method::Vera, Method::Vera]),
            ] {
                let layers = layers(&device, quantization, dropout, methods);
                let seeds = [Some(5), Some(6), Some(7)];
                let x = random([9, 64], 3, &device).require_grad();
                let gradients = [96, 32, 64].map(|width| random([9, width], width as u64, &device));

                let mut outputs = Vec::new();
                let mut sum = Tensor::<1>::zeros([1], &device);
                for i in 0..3 {
                    let y = layers[i].forward_seeded(x.clone(), seeds[i]);
                    sum = sum + (y.clone() * gradients[i].clone()).sum();
                    outputs.push(y.inner());
                }
                let reference = sum.backward();

                let group = LinearGroup::new(layers.each_ref(), seeds);
                let plain = x.clone().inner();
                let sum = outputs[2].clone() * 2.0;
                let (got, saved) = group.forward(&plain, [None, None, Some(sum)]);
                let [first, second, third] = got;
                let expected_third = outputs[2].clone() * 3.0;
                for (got, expected) in [
                    (&first, &outputs[0]),
                    (&second, &outputs[1]),
                    (&third, &expected_third),
                ] {
                    assert!(distance(got, expected) < 2e-6);
                }

                let mut accumulated: HashMap<ParamId, Tensor<2>> = HashMap::new();
                let d_input = group.backward(
                    || plain.clone(),
                    saved,
                    gradients.clone().map(|gradient| gradient.inner()),
                    true,
                    &mut |param, gradient| {
                        accumulated.insert(param.id, gradient);
                    },
                );
                // f32 sums of up to 96 products in another order.
                assert!(distance(&d_input.unwrap(), &x.grad(&reference).unwrap()) < 2e-6);
                let trainable: Vec<_> = layers.iter().flat_map(LoraLinear::trainable).collect();
                let dora = methods.contains(&Method::Dora);
                assert_eq!(trainable.len(), if dora { 5 } else { 4 });
                assert_eq!(accumulated.len(), trainable.len());
                for param in trainable {
                    let expected = param.val().grad(&reference).unwrap();
                    assert!(distance(&accumulated[&param.id], &expected) < 2e-6);
                }
            }
        }
    }

    #[test]
    fn without_adapters_the_input_is_not_computed() {
        let device = Device::flex();
        let layer = LoraLinear::frozen(LinearConfig::new(8, 4).init(&device));
        let group = LinearGroup::new([&layer], [None]);
        let (_, saved) = group.forward(&Tensor::ones([3, 8], &device), [None]);
        let d_input = group.backward(
            || panic!("nothing needs the input"),
            saved,
            [Tensor::ones([3, 4], &device)],
            true,
            &mut |_, _| panic!("nothing is trained"),
        );
        assert_eq!(d_input.unwrap().dims(), [3, 8]);
        let none = group.backward(
            || panic!("nothing needs the input"),
            group.forward(&Tensor::ones([3, 8], &device), [None]).1,
            [Tensor::ones([3, 4], &device)],
            false,
            &mut |_, _| panic!("nothing is trained"),
        );
        assert!(none.is_none());
    }
}
