//! Tables in 16 bits on the CPU, which computes in f32: the embedding and the output layer stay as their
//! file holds them, half as large and just as exact.

use ::half::{bf16, f16};
use burn::backend::Flex;
use burn::tensor::{DType, Tensor};

use super::Direction;
use super::few_scores::{self, Number};
use super::panels::{self, Stored};
use crate::cpu::{self, FlexTensor, Values};
use crate::multiply_add;

/// Whether products with this table unpack it: 16 bits on Burn's CPU backend, outside an autodiff graph.
fn is_half(table: &Tensor<2>) -> bool {
    matches!(table.dtype(), DType::F16 | DType::BF16) && cpu::is_on_cpu(table)
}

/// [`crate::table_logits`] for f32 rows.
pub fn logits(x: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    if is_half(&table) {
        return product(None, x, table, Direction::Backward);
    }
    let ([n, width], [rows, _]) = (x.dims(), table.dims());
    if !is_few(n) || !cpu::is_native(&table) {
        return multiply_add(None, 1.0, x, table.transpose());
    }
    let (x, table) = (cpu::values(x), cpu::values(table));
    let scores = few_scores::scores(x.as_slice(), n, table.as_slice(), width);
    cpu::tensor(scores, [n, rows])
}

/// [`crate::table_logits_backward`] for f32 gradients.
pub fn logits_backward(sum: Option<Tensor<2>>, gradient: Tensor<2>, table: Tensor<2>) -> Tensor<2> {
    if is_half(&table) {
        product(sum, gradient, table, Direction::Forward)
    } else {
        multiply_add(sum, 1.0, gradient, table)
    }
}

fn is_few(rows: usize) -> bool {
    (1..=few_scores::AT_MOST).contains(&rows)
}

fn product(
    sum: Option<Tensor<2>>,
    x: Tensor<2>,
    table: Tensor<2>,
    direction: Direction,
) -> Tensor<2> {
    let ([n, _], [rows, width]) = (x.dims(), table.dims());
    let sum = sum.map(cpu::values);
    let x = cpu::values(x);
    let table = cpu::primitive_of(table).to_contiguous();
    let product = match table.dtype() {
        DType::F16 => of::<f16>(sum, x.as_slice(), n, &table, [rows, width], direction),
        _ => of::<bf16>(sum, x.as_slice(), n, &table, [rows, width], direction),
    };
    Tensor::from_primitive::<Flex>(product)
}

fn of<H: Half>(
    sum: Option<Values>,
    x: &[f32],
    n: usize,
    table: &FlexTensor,
    [rows, width]: [usize; 2],
    direction: Direction,
) -> FlexTensor {
    let start = table.layout().start_offset();
    let values = &table.storage::<H>()[start..][..rows * width];
    if direction == Direction::Backward && is_few(n) && sum.is_none() {
        return cpu::primitive(few_scores::scores(x, n, values, width), [n, rows]);
    }
    let table = Table {
        values,
        shape: [rows, width],
    };
    panels::product(sum, x, n, &table, direction)
}

/// A float of 16 bits.
trait Half: burn::tensor::Element + bytemuck::Pod + Number {
    /// Widens a run of numbers.
    fn widen(from: &[Self], to: &mut [f32]);
}

impl Half for bf16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits((from.to_bits() as u32) << 16);
        }
    }
}

impl Half for f16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        let (lanes, rest) = to.as_chunks_mut::<16>();
        let (from_lanes, from_rest) = from.as_chunks::<16>();
        for (to, from) in lanes.iter_mut().zip(from_lanes) {
            let mut values = [0f32; 16];
            for i in 0..16 {
                values[i] = widened(from[i]);
            }
            *to = values;
        }
        for (to, from) in rest.iter_mut().zip(from_rest) {
            *to = widened(*from);
        }
    }
}

/// Exactly the number, in operations that become vector instructions where this is inlined: the conversion
/// of [`f16`] itself is a call, and asks each time what the processor can do.
#[inline(always)]
fn widened(from: f16) -> f32 {
    // The exponents of f32 reach 112 further down, and beyond the largest stand infinity and NaN.
    const REBIAS: u32 = 112 << 23;
    const SMALLEST_NORMAL: u32 = 113 << 23;
    let bits = u32::from(from.to_bits());
    let (sign, exponent) = ((bits & 0x8000) << 16, bits & 0x7c00);
    let shifted = (bits & 0x7fff) << 13;
    // With the exponent of the smallest normal number, less that number: what subnormal bits say.
    let subnormal = f32::from_bits(shifted | SMALLEST_NORMAL) - f32::from_bits(SMALLEST_NORMAL);
    let magnitude = match exponent {
        0 => subnormal.to_bits(),
        0x7c00 => shifted | 0x7f80_0000,
        _ => shifted + REBIAS,
    };
    f32::from_bits(sign | magnitude)
}

struct Table<'a, H> {
    values: &'a [H],
    shape: [usize; 2],
}

impl<H: Half> Stored for Table<'_, H> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn block(&self) -> usize {
        1
    }

    #[inline(always)]
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        H::widen(&self.values[first..][..panel.len()], panel);
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widened<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        Self::widen(row, scratch);
        scratch
    }
}

impl Number for f16 {
    #[inline(always)]
    fn widened<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        Self::widen(row, scratch);
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CounterRng, init, table_logits, table_logits_backward};
    use burn::tensor::{Device, Tolerance};

    #[test]
    fn every_16_bit_number_is_widened_exactly() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut got = vec![0f32; all.len()];
        f16::widen(&all, &mut got);
        for (from, got) in all.into_iter().zip(got) {
            let expected = from.to_f32();
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "{:#06x}: {got:e} {expected:e}", from.to_bits());
        }
    }

    #[test]
    fn a_table_in_16_bits_gives_the_products_of_its_widened_values() {
        let device = Device::flex();
        let mut rng = CounterRng::new(21);
        for dtype in [DType::F16, DType::BF16] {
            for (n, rows, width) in [(1, 300, 40), (3, 77, 576), (9, 500, 96), (40, 130, 70)] {
                let table = init::normal([rows, width], 0.5, &mut rng, &device);
                let table = table.cast(burn::tensor::FloatDType::from(dtype));
                let widened = table.clone().cast(burn::tensor::FloatDType::F32);
                let x = init::normal([n, width], 1.0, &mut rng, &device);
                let g = init::normal([n, rows], 1.0, &mut rng, &device);
                let sum = init::normal([n, width], 1.0, &mut rng, &device);
                // Sums of up to 576 products of about 0.5 in f32, in another order.
                let same = |got: Tensor<2>, expected: Tensor<2>| {
                    let tolerance = Tolerance::absolute(5e-5);
                    let (got, expected) = (got.into_data(), expected.into_data());
                    got.assert_approx_eq::<f32>(&expected, tolerance);
                };
                same(
                    table_logits(x.clone(), table.clone()),
                    x.matmul(widened.clone().transpose()),
                );
                let through = g.clone().matmul(widened);
                let added = sum.clone() + through.clone();
                same(
                    table_logits_backward(None, g.clone(), table.clone()),
                    through,
                );
                same(table_logits_backward(Some(sum), g, table), added);
            }
        }
    }
}
