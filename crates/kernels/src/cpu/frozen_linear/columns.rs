//! Weights whose blocks run along the input ([`IntegerWeight`](crate::IntegerWeight)), on the CPU.
//!
//! A scale belongs to one column, so a run of a row is integers times a run of scales, element by element.

use burn::backend::tensor::QuantizedTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::DType;

use super::Direction;
use super::decode::{add_by_columns, with_rows};
use super::panels::{self, Stored};
use crate::cpu::{self, FlexTensor, Values};

/// Rows of `x` up to which the weight is multiplied as it is unpacked.
const FEW: usize = 4;

/// Columns whose sums are held in registers at once.
const HELD: usize = 32;

/// A weight `[d_in, d_out]` in blocks of `block` rows of one column.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    integers: &'a [i8],
    /// `[d_in / block, d_out]`.
    scales: &'a [f32],
    d_in: usize,
    d_out: usize,
    block: usize,
}

impl<'a> Weight<'a> {
    /// `None` for another layout, or activations that are not f32.
    pub fn read(x: &FlexTensor, weight: &'a QuantizedTensor<Flex>) -> Option<Self> {
        let tensor = weight.tensor();
        let DType::QFloat(scheme) = weight.dtype() else {
            return None;
        };
        let [d_in, d_out] = weight.shape().dims::<2>();
        let block = match scheme.block_size()?.to_dim_vec(2)[..] {
            [block, 1] if block > 1 => block as usize,
            _ => return None,
        };
        let plain = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let fits = d_in.is_multiple_of(block) && weight.scales().len() * block == d_in * d_out;
        let usable = plain
            && fits
            && scheme.num_levels() == 1
            && x.dtype() == DType::F32
            && x.shape().num_dims() == 2;
        usable.then(|| Self {
            integers: &tensor.storage::<i8>()[..d_in * d_out],
            scales: weight.scales(),
            d_in,
            d_out,
            block,
        })
    }

    /// `sum + x · W` or `sum + x · Wᵀ`; without a sum, the product alone.
    pub fn product(
        self,
        sum: Option<FlexTensor>,
        x: FlexTensor,
        direction: Direction,
    ) -> FlexTensor {
        let n = x.shape()[0];
        let x = Values::new(x);
        let sum = sum.map(Values::new);
        if direction == Direction::Forward && (1..=FEW).contains(&n) {
            let zeros = || Values::new(cpu::primitive(vec![0.0; n * self.d_out], [n, self.d_out]));
            let mut sum = sum.unwrap_or_else(zeros);
            self.add_few_rows(x.as_slice(), n, sum.as_mut_slice());
            return sum.into_primitive();
        }
        panels::product(sum, x.as_slice(), n, &self, direction)
    }

    /// Adds `x · W` for at most [`FEW`] rows of `x`: integers are summed up under a block's common scale.
    fn add_few_rows(self, x: &[f32], n: usize, output: &mut [f32]) {
        add_by_columns(output, n, |part, sums| {
            cpu::vectorized(FewColumns {
                weight: self,
                x,
                n,
                first: part.start,
                sums,
            });
        });
    }
}

/// Adds the products of some columns from `first` on to `sums`, `[n, columns]`.
struct FewColumns<'a> {
    weight: Weight<'a>,
    x: &'a [f32],
    n: usize,
    first: usize,
    sums: &'a mut [f32],
}

impl cpu::Work for FewColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        with_rows!(self.n, [1 2 3 | FEW], N => self.rows::<N, FUSED>())
    }
}

impl FewColumns<'_> {
    #[inline(always)]
    fn rows<const N: usize, const FUSED: bool>(self) {
        let Weight {
            integers,
            scales,
            d_in,
            d_out,
            block,
        } = self.weight;
        let (x, first) = (self.x, self.first);
        let count = self.sums.len() / N;
        assert!(x.len() == N * d_in);
        for index in 0..d_in / block {
            for start in (0..count).step_by(HELD) {
                let width = HELD.min(count - start);
                let mut held = [[0f32; HELD]; N];
                for row in index * block..(index + 1) * block {
                    let at = row * d_out + first + start;
                    // The same columns come next of the rows behind these.
                    cpu::prefetch(integers, at + block * d_out);
                    let mut weights = [0f32; HELD];
                    if width == HELD {
                        let integers = &integers[at..][..HELD];
                        for i in 0..HELD {
                            weights[i] = f32::from(integers[i]);
                        }
                    } else {
                        // The last columns of a width that HELD does not divide.
                        for (weight, integer) in weights[..width].iter_mut().zip(&integers[at..]) {
                            *weight = f32::from(*integer);
                        }
                    }
                    for (n, held) in held.iter_mut().enumerate() {
                        let x = x[n * d_in + row];
                        for i in 0..HELD {
                            held[i] = cpu::multiply_add::<FUSED>(x, weights[i], held[i]);
                        }
                    }
                }
                let scales = &scales[index * d_out + first + start..][..width];
                for (n, held) in held.iter().enumerate() {
                    let sums = &mut self.sums[n * count + start..][..width];
                    for ((sum, held), scale) in sums.iter_mut().zip(held).zip(scales) {
                        *sum += held * scale;
                    }
                }
            }
        }
    }
}

impl Stored for Weight<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.d_in, self.d_out]
    }

    fn block(&self) -> usize {
        1
    }

    #[inline(always)]
    fn unpack(&self, first: usize, panel: &mut [f32]) {
        let mut row = first / self.d_out;
        let mut column = first % self.d_out;
        let mut rest = panel;
        while !rest.is_empty() {
            let (run, after) = rest.split_at_mut(rest.len().min(self.d_out - column));
            let integers = &self.integers[row * self.d_out + column..][..run.len()];
            let scales = &self.scales[row / self.block * self.d_out + column..][..run.len()];
            for ((value, integer), scale) in run.iter_mut().zip(integers).zip(scales) {
                *value = *integer as f32 * scale;
            }
            (row, column, rest) = (row + 1, 0, after);
        }
    }
}
