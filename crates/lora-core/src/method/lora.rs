//! LoRA (Hu et al., 2021, <https://arxiv.org/abs/2106.09685>): `W₀ + γ·A·B`. The type is Burn's own.

use burn::module::{LoraAdapter, Param};
use burn::tensor::Tensor;

use super::{Accumulate, Adapter, Facts, Method, attached};

pub(super) static FACTS: Facts = Facts {
    name: "LoRA",
    peft_type: "LORA",
    flag: None,
    lacks: &LACKS,
    renamed: &[],
    shared: None,
    vectors: &[],
    beyond_low_rank: None,
    scales_outputs: false,
    allows_lora_bias: true,
};

/// Settings of methods whose matrices are not trained.
pub(super) static LACKS: [&str; 3] = ["d_initial", "projection_prng_key", "save_projection"];

impl Adapter for LoraAdapter {
    fn method(&self) -> Method {
        Method::Lora
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn rank(&self) -> usize {
        self.a.lazy_shape()[1]
    }

    fn factors(&self) -> [Tensor<2>; 2] {
        [self.a.val(), self.b.val()]
    }

    fn trainable(&self) -> Vec<&Param<Tensor<2>>> {
        vec![&self.a, &self.b]
    }

    fn gradient_of_a(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        accumulate(&self.a, gradient);
    }

    fn gradient_of_b(&self, gradient: Tensor<2>, accumulate: &mut Accumulate<'_>) {
        accumulate(&self.b, gradient);
    }

    fn attach_to(
        &self,
        weight: Param<Tensor<2>>,
        _dense: &dyn Fn() -> Tensor<2>,
    ) -> Param<Tensor<2>> {
        attached(weight, self.clone())
    }

    fn attach_for_inference(&self, weight: Param<Tensor<2>>) -> Param<Tensor<2>> {
        attached(weight, self.clone())
    }
}
