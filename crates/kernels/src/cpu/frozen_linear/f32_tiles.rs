//! The CPU with AVX-512: f32 products in tiles (see `tiles.rs`) with a weight that is not an f32 matrix.

use std::ops::Range;

use super::Direction;
use super::panels::Stored;
use super::tiles::{self, Activations, LANES, Output, Panel, Sums};

/// Whether the processor (and the operating system) can run [`product`].
pub(super) fn is_supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x · W` or `x · Wᵀ` for `x` of `n` rows.
///
/// # Panics
///
/// If the shapes do not fit, or unless [`is_supported`].
pub(super) fn product(
    x: &[f32],
    n: usize,
    weight: &impl Stored,
    direction: Direction,
    output: Output,
) {
    assert!(is_supported(), "the processor has no AVX-512");
    #[cfg(target_arch = "x86_64")]
    product_in::<super::avx512::Avx512<false>>(x, n, weight, direction, output);
}

fn product_in<S: Sums>(
    x: &[f32],
    n: usize,
    weight: &impl Stored,
    direction: Direction,
    output: Output,
) {
    let (inner, outer) = direction.inner_and_outer(weight.shape());
    let x = Activations {
        items: bytemuck::cast_slice(x),
        stride: inner,
    };
    let weight = Floats { weight, direction };
    tiles::product::<S>(x, [n, inner, outer], &weight, output);
}

/// The panels of a weight: its elements as f32.
struct Floats<'a, W> {
    weight: &'a W,
    direction: Direction,
}

impl<W: Stored> tiles::Weight for Floats<'_, W> {
    fn unit(&self) -> usize {
        match self.direction {
            Direction::Forward => 1,
            Direction::Backward => self.weight.block(),
        }
    }

    #[inline(always)]
    fn fill<S: Sums>(&self, panel: &mut Panel, tiles: Range<usize>, inner: Range<usize>) {
        let [d_in, d_out] = self.weight.shape();
        let height = panel.height;
        match self.direction {
            Direction::Forward => {
                // Row by row, in the order of the weight's memory.
                for (i, row) in inner.enumerate() {
                    for tile in 0..tiles.len() {
                        let first = (tiles.start + tile) * LANES;
                        let width = (d_out - first).min(LANES);
                        let lanes = panel.items[tile * height + i].as_flattened_mut();
                        let lanes: &mut [f32] = bytemuck::cast_slice_mut(lanes);
                        self.weight.unpack(row * d_out + first, &mut lanes[..width]);
                        lanes[width..].fill(0.0);
                    }
                }
            }
            Direction::Backward => {
                for (tile, items) in panel.items.chunks_exact_mut(height).enumerate() {
                    let first = (tiles.start + tile) * LANES;
                    let rows = first..d_in.min(first + LANES);
                    self.weight.unpack_rows::<S>(rows, inner.clone(), items);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::flex::Packed;
    use super::super::panels;
    use super::*;
    use crate::CounterRng;

    /// Sums in plain Rust, to run the tiles on any processor.
    #[derive(Clone, Copy)]
    struct Plain([f32; 16]);

    impl Sums for Plain {
        const NUMBERS: usize = 1;
        const CHUNK: usize = 768;

        fn zero() -> Self {
            Self([0.0; 16])
        }

        fn add_products(mut self, x: u32, weights: &[u32; 16]) -> Self {
            for (sum, weight) in self.0.iter_mut().zip(weights) {
                *sum += f32::from_bits(x) * f32::from_bits(*weight);
            }
            self
        }

        fn added_to(self, before: [f32; 16], _: Option<&[f32; 16]>) -> [f32; 16] {
            std::array::from_fn(|i| self.0[i] + before[i])
        }
    }

    /// A weight that is stored as f32, and unpacked with the default method.
    struct Floats {
        values: Vec<f32>,
        shape: [usize; 2],
        block: usize,
    }

    impl Stored for Floats {
        fn shape(&self) -> [usize; 2] {
            self.shape
        }

        fn block(&self) -> usize {
            self.block
        }

        fn unpack(&self, first: usize, panel: &mut [f32]) {
            panel.copy_from_slice(&self.values[first..][..panel.len()]);
        }
    }

    type Multiply<W> = fn(&[f32], usize, &W, Direction, Output);

    fn compute<W: Stored>(
        multiply: Multiply<W>,
        x: &[f32],
        n: usize,
        weight: &W,
        direction: Direction,
    ) -> [Vec<f32>; 2] {
        let (inner, outer) = direction.inner_and_outer(weight.shape());
        let x = &x[..n * inner];
        let mut new = Vec::with_capacity(n * outer);
        let output = Output::New(&mut new.spare_capacity_mut()[..n * outer]);
        multiply(x, n, weight, direction, output);
        // SAFETY: there is room, and the product has written all of it.
        unsafe { new.set_len(n * outer) };
        let mut sum = vec![0.5; n * outer];
        multiply(x, n, weight, direction, Output::Sum(&mut sum));
        [new, sum]
    }

    fn check(computed: &[f32], added: f64, expected: &[f64], what: &str) {
        assert_eq!(computed.len(), expected.len());
        let pairs = computed.iter().zip(expected);
        let difference: f64 = pairs.map(|(c, e)| (*c as f64 - added - e).powi(2)).sum();
        let norm: f64 = expected.iter().map(|e| e.powi(2)).sum();
        let error = (difference / norm).sqrt();
        // f32 sums of up to 2,500 products; 0.5 is added where the sum is as large as a product.
        assert!(error < 2e-6, "{what}: {error:e}");
    }

    #[test]
    fn products_are_those_of_the_unpacked_weight() {
        let mut rng = CounterRng::new(5);
        // Full and partial tiles, strips and chunks; rows of 4 KiB; blocks that differ from a tile's width.
        for [n, d_in, d_out, block] in [
            [1, 1, 2, 2],
            [3, 33, 40, 8],
            [7, 64, 96, 32],
            [12, 31, 160, 32],
            [13, 9, 66, 6],
            [33, 1024, 172, 4],
            [25, 200, 2048, 64],
            [40, 2050, 64, 32],
            [38, 576, 1536, 32],
        ] {
            let mut normal = |count: usize, scale: f32| -> Vec<f32> {
                (0..count).map(|_| rng.normal() as f32 * scale).collect()
            };
            let integers = normal(d_in * d_out, 50.0);
            let integers: Vec<i8> = integers.into_iter().map(|x| x as i8).collect();
            let scales = normal(d_in * d_out / block, 0.02);
            let x = normal(n * d_in.max(d_out), 1.0);
            let packed = Packed {
                integers: &integers,
                scales: &scales,
                d_in,
                d_out,
                block,
            };
            let value = |i: usize| integers[i] as f32 * scales[i / block];
            let floats = Floats {
                values: (0..d_in * d_out).map(value).collect(),
                shape: [d_in, d_out],
                block,
            };
            for direction in [Direction::Forward, Direction::Backward] {
                let (inner, outer) = direction.inner_and_outer([d_in, d_out]);
                let element = |i: usize| -> f64 {
                    let (row, column) = (i / outer, i % outer);
                    let term = |k: usize| {
                        let weight = match direction {
                            Direction::Forward => floats.values[k * d_out + column],
                            Direction::Backward => floats.values[column * d_out + k],
                        };
                        x[row * inner + k] as f64 * weight as f64
                    };
                    (0..inner).map(term).sum()
                };
                let expected: Vec<f64> = (0..n * outer).map(element).collect();
                let plain = compute(product_in::<Plain>, &x, n, &packed, direction);
                let general = compute(product_in::<Plain>, &x, n, &floats, direction);
                assert!(plain == general, "{n} {d_in} {d_out} {block} {direction:?}");
                let mut all = vec![("plain", plain)];
                let in_panels = compute(panels::in_panels, &x, n, &packed, direction);
                all.push(("in panels", in_panels));
                if is_supported() {
                    let native = compute(product, &x, n, &packed, direction);
                    let general = compute(product, &x, n, &floats, direction);
                    assert!(
                        native == general,
                        "{n} {d_in} {d_out} {block} {direction:?}"
                    );
                    all.push(("AVX-512", native));
                }
                for (name, [new, sum]) in all {
                    let what = format!("{name} {n} {d_in} {d_out} {block} {direction:?}");
                    check(&new, 0.0, &expected, &what);
                    check(&sum, 0.5, &expected, &format!("{what} +="));
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let mut rng = CounterRng::new(6);
        let mut normal =
            |count: usize| -> Vec<f32> { (0..count).map(|_| rng.normal() as f32).collect() };
        let shape = [700, 96];
        let values = normal(shape[0] * shape[1]);
        let block = 1;
        let weight = Floats {
            values,
            shape,
            block,
        };
        let x = normal(50 * 700);
        for direction in [Direction::Forward, Direction::Backward] {
            // More threads than tiles: some share the rows of a tile.
            let [one, eight] = [1, 8].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let pool = pool.build().unwrap();
                pool.install(|| compute(product_in::<Plain>, &x, 50, &weight, direction))
            });
            assert!(one == eight);
        }
    }
}
