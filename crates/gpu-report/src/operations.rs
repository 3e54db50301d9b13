//! Every operation of a training step, compared with the CPU.

use burn::tensor::activation::{log_softmax, sigmoid, silu, softmax};
use burn::tensor::{Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};
use kernels::{Quantization, frozen_linear, frozen_linear_backward, product, quantize_data};
use llama_burn::RmsNorm;

use super::compare::{self, Depth, input, values};
use super::error::ReportError;
use super::finding::{Check, Finding};

/// An operation on two inputs, `[ROWS, INNER]` and `[INNER, COLUMNS]`.
type Operation = fn(&Inputs) -> Vec<Tensor<2>>;

// Not multiples of a tile, so that the edges of kernels are compared as well.
const ROWS: usize = 77;
const INNER: usize = 160;
const COLUMNS: usize = 96;

/// The inputs of all operations on one device.
struct Inputs {
    /// `[ROWS, INNER]`
    a: Tensor<2>,
    /// `[INNER, COLUMNS]`
    b: Tensor<2>,
    /// `[ROWS, COLUMNS]`
    c: Tensor<2>,
    /// `[ROWS, COLUMNS]`
    d: Tensor<2>,
    /// `[INNER, COLUMNS]`, 8 bits
    quantized: Tensor<2>,
    /// `[ROWS]`, each below ROWS
    places: Tensor<1, Int>,
}

impl Inputs {
    fn new(dtype: FloatDType, device: &Device) -> Result<Self, ReportError> {
        let weight = input([INNER, COLUMNS], 5, FloatDType::F32, &Device::flex());
        let weight = quantize_data(&values(weight)?, [INNER, COLUMNS], Quantization::Bits8);
        let (weight, _) = weight.ok_or(ReportError::Blocks([INNER, COLUMNS]))?;
        let places: Vec<i32> = (0..ROWS).map(|row| (row * 31 % ROWS) as i32).collect();
        Ok(Self {
            a: input([ROWS, INNER], 1, dtype, device),
            b: input([INNER, COLUMNS], 2, dtype, device),
            c: input([ROWS, COLUMNS], 3, dtype, device),
            d: input([ROWS, COLUMNS], 4, dtype, device),
            quantized: Tensor::from_data(weight, device),
            places: Tensor::from_data(TensorData::new(places, [ROWS]), device),
        })
    }
}

const OPERATIONS: [(&str, Operation); 15] = [
    ("product", |x| vec![product(x.a.clone(), x.b.clone())]),
    ("product, transposed", |x| {
        vec![product(x.c.clone(), x.b.clone().transpose())]
    }),
    ("product with few columns", |x| {
        vec![product(x.a.clone(), x.b.clone().narrow(1, 0, 8))]
    }),
    ("product with a sum fused", |x| {
        vec![product(x.a.clone(), x.b.clone()).mul_scalar(2.0) + x.c.clone()]
    }),
    ("quantized product", |x| {
        vec![frozen_linear(x.a.clone(), x.quantized.clone())]
    }),
    ("quantized product, backward", |x| {
        vec![frozen_linear_backward(x.c.clone(), x.quantized.clone())]
    }),
    ("RMSNorm", |x| {
        let ones = Tensor::ones([COLUMNS], (&x.c.device(), burn::tensor::DType::F32));
        let norm = RmsNorm {
            weight: burn::module::Param::initialized(Default::default(), ones),
            eps: 1e-5,
        };
        vec![norm.forward(x.c.clone())]
    }),
    ("softmax", |x| vec![softmax(x.c.clone(), 1)]),
    ("log softmax", |x| vec![log_softmax(x.c.clone(), 1)]),
    ("SwiGLU", |x| vec![silu(x.c.clone()) * x.d.clone()]),
    ("SwiGLU, backward", |x| {
        let (gate, gradient) = (x.c.clone(), x.d.clone());
        let s = sigmoid(gate.clone());
        let slope = s.clone() * (gate.clone() * s.clone().neg().add_scalar(1.0)).add_scalar(1.0);
        vec![gradient.clone() * gate * s, gradient * slope]
    }),
    ("rotation of halves (RoPE)", |x| {
        let half = COLUMNS / 2;
        let (left, right) = (
            x.c.clone().narrow(1, 0, half),
            x.c.clone().narrow(1, half, half),
        );
        vec![Tensor::cat(vec![right.neg(), left], 1) * x.d.clone() + x.c.clone()]
    }),
    ("sums of rows and of columns", |x| {
        vec![x.c.clone().square().sum_dim(1), x.c.clone().sum_dim(0)]
    }),
    ("select rows", |x| {
        vec![x.c.clone().select(0, x.places.clone())]
    }),
    ("select and add rows", |x| {
        let (places, rows) = (x.places.clone(), x.d.clone());
        let sum =
            x.c.clone()
                .select_assign(0, places, rows, IndexingUpdateOp::Add);
        vec![sum]
    }),
];

/// Compares every operation in each of these types with the CPU's f32 of the same inputs.
///
/// # Errors
///
/// If the device fails.
pub fn run(
    types: &[FloatDType],
    device: &Device,
    tell: &mut dyn FnMut(Finding),
) -> Result<(), ReportError> {
    for dtype in types {
        let expected = Inputs::new(*dtype, &Device::flex())?;
        let inputs = Inputs::new(*dtype, device)?;
        for (name, operation) in OPERATIONS {
            tell(Finding::Check(compared(
                name, operation, *dtype, &inputs, &expected,
            )?));
        }
    }
    Ok(())
}

fn compared(
    name: &str,
    operation: Operation,
    dtype: FloatDType,
    inputs: &Inputs,
    expected: &Inputs,
) -> Result<Check, ReportError> {
    let read = |outputs: Vec<Tensor<2>>| {
        let outputs = outputs.into_iter().map(values);
        outputs.collect::<Result<Vec<_>, _>>()
    };
    let (got, expected) = (read(operation(inputs))?, read(operation(expected))?);
    Ok(compare::check(
        name,
        dtype,
        Depth::Operation,
        &got,
        &expected,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_that_is_another_one_fails() {
        let device = Device::flex();
        let inputs = Inputs::new(FloatDType::F32, &device).unwrap();
        let other = Inputs {
            c: inputs.d.clone(),
            ..Inputs::new(FloatDType::F32, &device).unwrap()
        };
        for (name, operation) in OPERATIONS {
            let same = compared(name, operation, FloatDType::F32, &inputs, &inputs).unwrap();
            assert!(same.ok, "{same:?}");
            if name.contains("softmax") {
                let wrong = compared(name, operation, FloatDType::F32, &other, &inputs).unwrap();
                assert!(!wrong.ok, "{wrong:?}");
            }
        }
    }
}
