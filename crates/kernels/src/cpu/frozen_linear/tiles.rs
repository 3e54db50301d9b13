//! Products in tiles: the common part of the CPU's kernels for a packed weight.
//!
//! The output is divided into tiles of [`LANES`] columns. A thread takes a few tiles, unpacks their part of the weight
//! into a panel that fits its second-level cache, with the values for a tile's columns contiguous, and multiplies
//! strips of up to [`ROWS`] rows with it. The activations are read in place, and neither operand is packed a second
//! time, as a general product would pack a panel.
//!
//! Factors are items of four bytes: the bits of an f32, or a pair of bf16 numbers.
//!
//! Sums run in a fixed order: results do not depend on the number of threads.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::{self, FlexTensor, Values};

/// Columns of the output per micro-tile: two vectors of sums.
pub(super) const LANES: usize = 32;

/// The largest number of rows of a micro-tile: 12 · 2 sums, two vectors of weights and one of activations fit the 32
/// registers.
pub(super) const ROWS: usize = 12;

/// Items in a panel: 256 KiB, so that it stays in a core's second-level cache.
const PANEL: usize = 64 * 1024;

/// With fewer multiply-adds one thread computes the whole product.
const PARALLEL_FROM: usize = 1 << 20;

/// Addresses that differ by a multiple of this map to the same set of a first-level cache.
const CACHE_WAY: usize = 4096;

/// One value for each column of a tile.
pub(super) type Lanes<T> = [[T; 16]; 2];

/// 16 sums in f32, and the instructions of products.
///
/// An implementation must not be used on a processor that lacks its instructions.
pub(super) trait Sums: Copy {
    /// The number of factors in an item.
    const NUMBERS: usize;

    /// The largest part of the inner dimension in a panel.
    const CHUNK: usize;

    /// [`Job::columns`], compiled for the processor that has the instructions.
    fn columns<W: Weight>(
        job: &Job<Self, W>,
        tiles: Range<usize>,
        rows: Range<usize>,
        scratch: &mut Scratch,
    ) {
        job.columns(tiles, rows, scratch);
    }

    /// The transpose.
    #[inline(always)]
    fn transposed(rows: [[u32; 16]; 16]) -> [[u32; 16]; 16] {
        std::array::from_fn(|column| std::array::from_fn(|row| rows[row][column]))
    }

    fn zero() -> Self;

    /// `self[i] + x · weights[i]`.
    fn add_products(self, x: u32, weights: &[u32; 16]) -> Self;

    /// `before[i] + self[i] · scales[i]`; without scales, `before[i] + self[i]`.
    fn added_to(self, before: [f32; 16], scales: Option<&[f32; 16]>) -> [f32; 16];
}

/// A weight that panels are filled from.
pub(super) trait Weight: Sync {
    /// The number of indices of the inner dimension that must stay together; even for pairs.
    fn unit(&self) -> usize;

    /// Replaces all items of `panel` by these tiles of the output's columns and these indices of the inner
    /// dimension.
    ///
    /// `#[inline(always)]`, as are its callees: it is compiled with the target features of [`Sums::columns`]. Loops
    /// instead of closures, which the compiler may compile without these features.
    fn fill<S: Sums>(&self, panel: &mut Panel, tiles: Range<usize>, inner: Range<usize>);
}

/// Part of a weight: some tiles of the output's columns, and a part of the inner dimension.
#[derive(Default)]
pub(super) struct Panel {
    /// `[tiles, height]`.
    pub(super) items: Vec<Lanes<u32>>,
    /// `[tiles, height / run]`, the factors of the sums over runs; or empty.
    pub(super) scales: Vec<Lanes<f32>>,
    /// Items along the inner dimension.
    pub(super) height: usize,
    /// Items that are summed before the sum is scaled and added to the output.
    pub(super) run: usize,
}

/// A thread's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    panel: Panel,
    /// A strip of activations, if they cannot be read in place.
    strip: Vec<u32>,
}

thread_local! {
    /// Kept between products: new memory would cost page faults.
    static OF_THREAD: RefCell<Scratch> = RefCell::default();
}

/// The output of a product.
#[derive(Debug)]
pub(crate) enum Output<'a> {
    /// All elements are written, none is read.
    New(&'a mut [MaybeUninit<f32>]),
    /// The product is added.
    Sum(&'a mut [f32]),
}

impl Output<'_> {
    /// Runs `multiply`, which adds to `sum`, or without a sum writes to a new tensor `[n, width]`. Returns the tensor.
    ///
    /// # Panics
    ///
    /// If the sum has another number of elements.
    pub(super) fn of(
        sum: Option<Values>,
        [n, width]: [usize; 2],
        multiply: impl FnOnce(Output),
    ) -> FlexTensor {
        match sum {
            Some(mut sum) => {
                let output = sum.as_mut_slice();
                assert_eq!(output.len(), n * width, "the sum has another shape");
                multiply(Output::Sum(output));
                sum.into_primitive()
            }
            None => {
                let mut new = Vec::with_capacity(n * width);
                multiply(Output::New(&mut new.spare_capacity_mut()[..n * width]));
                // SAFETY: a product writes every element of a new output.
                unsafe { new.set_len(n * width) };
                cpu::primitive(new, [n, width])
            }
        }
    }
}

/// Activations, in items.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activations<'a> {
    pub(super) items: &'a [u32],
    /// The stride of rows, in items.
    pub(super) stride: usize,
}

/// `x · weight`, `[n, outer]`, for `x` `[n, inner]`.
///
/// # Panics
///
/// If the shapes do not fit.
pub(super) fn product<S: Sums>(
    x: Activations,
    [n, inner, outer]: [usize; 3],
    weight: &impl Weight,
    output: Output,
) {
    let (data, length, accumulate) = match output {
        Output::New(output) => (output.as_mut_ptr().cast(), output.len(), false),
        Output::Sum(output) => (output.as_mut_ptr(), output.len(), true),
    };
    let width = inner.div_ceil(S::NUMBERS);
    assert!(
        inner > 0 && x.stride >= width && length == n * outer,
        "{length} elements for {n} rows of {inner} and {outer}"
    );
    if length == 0 {
        return;
    }
    assert!(
        x.items.len() >= (n - 1) * x.stride + width,
        "{} items for {n} rows of {width}",
        x.items.len()
    );
    let chunk = chunk(inner, weight.unit(), S::CHUNK);
    let job = Job {
        x,
        weight,
        output: data,
        columns: outer,
        inner,
        chunk,
        accumulate,
        sums: PhantomData::<S>,
    };
    let tiles = outer.div_ceil(LANES);
    let is_parallel = n * inner * outer >= PARALLEL_FROM;
    let threads = if is_parallel {
        rayon::current_num_threads()
    } else {
        1
    };
    let groups = groups(tiles, chunk.div_ceil(S::NUMBERS), threads);
    // If there are more threads than groups, several threads share the rows of a group.
    let shares = (threads / groups).clamp(1, n.div_ceil(ROWS));
    let work = |part: usize| {
        let (group, share) = (part / shares, part % shares);
        let tiles = tiles * group / groups..tiles * (group + 1) / groups;
        let rows = n * share / shares..n * (share + 1) / shares;
        OF_THREAD.with_borrow_mut(|scratch| S::columns(&job, tiles, rows, scratch));
    };
    if is_parallel {
        (0..groups * shares).into_par_iter().for_each(work)
    } else {
        (0..groups * shares).for_each(work)
    }
}

/// Divides the inner dimension equally into chunks of at most about `most`, of whole units.
fn chunk(inner: usize, unit: usize, most: usize) -> usize {
    inner.div_ceil(inner.div_ceil(most)).next_multiple_of(unit)
}

/// The number of groups of tiles: one panel per group, and the same number of groups for each thread.
fn groups(tiles: usize, height: usize, threads: usize) -> usize {
    let most = PANEL / (height * LANES);
    tiles
        .div_ceil(most.max(1))
        .next_multiple_of(threads)
        .min(tiles)
}

/// A product, of which threads compute different elements.
pub(super) struct Job<'a, S, W> {
    x: Activations<'a>,
    weight: &'a W,
    /// `[rows, columns]`.
    output: *mut f32,
    columns: usize,
    inner: usize,
    /// The part of the inner dimension in a panel.
    chunk: usize,
    /// Whether the product is added to the output.
    accumulate: bool,
    sums: PhantomData<S>,
}

// SAFETY: the output is borrowed for the whole product, and threads write different elements.
unsafe impl<S, W: Sync> Sync for Job<'_, S, W> {}

impl<S: Sums, W: Weight> Job<'_, S, W> {
    /// Computes these rows of these tiles, which no other thread may use.
    #[inline(always)]
    pub(super) fn columns(&self, tiles: Range<usize>, rows: Range<usize>, scratch: &mut Scratch) {
        let Scratch { panel, strip: copy } = scratch;
        for start in (0..self.inner).step_by(self.chunk) {
            let inner = start..self.inner.min(start + self.chunk);
            panel.scales.clear();
            panel.height = inner.len().div_ceil(S::NUMBERS);
            panel.run = panel.height;
            let length = panel.height * tiles.len();
            panel.items.resize(length, [[0; 16]; 2]);
            self.weight.fill::<S>(panel, tiles.clone(), inner);
            // Strips of nearly equal heights: a short one takes as long as a tall one.
            let strips = rows.len().div_ceil(ROWS);
            for strip in 0..strips {
                let first = rows.start + rows.len() * strip / strips;
                let height = rows.start + rows.len() * (strip + 1) / strips - first;
                let x = self.strip([first, height], start / S::NUMBERS, panel.height, copy);
                let place = [first, tiles.start];
                let is_first = start == 0;
                match height {
                    12 => self.multiply::<12>(x, panel, place, is_first),
                    11 => self.multiply::<11>(x, panel, place, is_first),
                    10 => self.multiply::<10>(x, panel, place, is_first),
                    9 => self.multiply::<9>(x, panel, place, is_first),
                    8 => self.multiply::<8>(x, panel, place, is_first),
                    7 => self.multiply::<7>(x, panel, place, is_first),
                    6 => self.multiply::<6>(x, panel, place, is_first),
                    5 => self.multiply::<5>(x, panel, place, is_first),
                    4 => self.multiply::<4>(x, panel, place, is_first),
                    3 => self.multiply::<3>(x, panel, place, is_first),
                    2 => self.multiply::<2>(x, panel, place, is_first),
                    _ => self.multiply::<1>(x, panel, place, is_first),
                }
            }
        }
    }

    /// A strip of activations, `[height, width]` from this row and item on: in place, or a copy if its rows would evict
    /// one another from the first-level cache.
    #[inline(always)]
    fn strip<'x>(
        &'x self,
        [first, height]: [usize; 2],
        start: usize,
        width: usize,
        copy: &'x mut Vec<u32>,
    ) -> Activations<'x> {
        let Activations { items, stride } = self.x;
        let items = &items[first * stride + start..];
        if !(4 * stride).is_multiple_of(CACHE_WAY) {
            return Activations { items, stride };
        }
        let padded = width + 16;
        copy.resize(height * padded, 0);
        for (copy, x) in copy.chunks_exact_mut(padded).zip(items.chunks(stride)) {
            copy[..width].copy_from_slice(&x[..width]);
        }
        Activations {
            items: copy,
            stride: padded,
        }
    }

    /// Multiplies a strip of `HEIGHT` rows with a panel, into the output from this row and tile on.
    #[inline(always)]
    fn multiply<const HEIGHT: usize>(
        &self,
        x: Activations,
        panel: &Panel,
        [row, first]: [usize; 2],
        is_first: bool,
    ) {
        let runs = panel.height.div_ceil(panel.run);
        for (i, tile) in panel.items.chunks_exact(panel.height).enumerate() {
            let column = (first + i) * LANES;
            for (run, weights) in tile.chunks(panel.run).enumerate() {
                let sums = sums::<S, HEIGHT>(&x.items[run * panel.run..], x.stride, weights);
                let scales = panel.scales.get(i * runs + run);
                let accumulate = self.accumulate || !is_first || run > 0;
                // SAFETY: these elements are this thread's; the first run has written them.
                unsafe { self.store(sums, scales, [row, column], accumulate) };
            }
        }
    }

    /// Writes sums, times `scales`, from this row and column on, or adds them.
    ///
    /// # Safety
    ///
    /// No other thread uses these rows of the tile that starts at the column. They are initialized if they are added
    /// to.
    #[inline(always)]
    unsafe fn store<const HEIGHT: usize>(
        &self,
        sums: [[S; 2]; HEIGHT],
        scales: Option<&Lanes<f32>>,
        [row, column]: [usize; 2],
        accumulate: bool,
    ) {
        let is_whole = column + LANES <= self.columns;
        for (r, sums) in sums.iter().enumerate() {
            for (half, sums) in sums.iter().enumerate() {
                let column = column + half * 16;
                let place = self.output.wrapping_add((row + r) * self.columns + column);
                let scales = scales.map(|scales| &scales[half]);
                // SAFETY: these elements of the output, up to the end of its row, are in the caller's tile.
                unsafe {
                    if is_whole {
                        let place = place.cast::<[f32; 16]>();
                        let before = if accumulate { place.read() } else { [0.0; 16] };
                        place.write(sums.added_to(before, scales));
                    } else {
                        let count = self.columns.saturating_sub(column).min(16);
                        let mut values = [0.0; 16];
                        if accumulate {
                            values.as_mut_ptr().copy_from(place, count);
                        }
                        let values = sums.added_to(values, scales);
                        place.copy_from(values.as_ptr(), count);
                    }
                }
            }
        }
    }
}

/// The products of `HEIGHT` rows of activations, `stride` apart, with a run of weights.
#[inline(always)]
fn sums<S: Sums, const HEIGHT: usize>(
    x: &[u32],
    stride: usize,
    weights: &[Lanes<u32>],
) -> [[S; 2]; HEIGHT] {
    assert!(x.len() >= (HEIGHT - 1) * stride + weights.len());
    let mut sums = [[S::zero(); 2]; HEIGHT];
    for (i, [left, right]) in weights.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: asserted above.
            let x = unsafe { *x.get_unchecked(r * stride + i) };
            sums[0] = sums[0].add_products(x, left);
            sums[1] = sums[1].add_products(x, right);
        }
    }
    sums
}

/// The number of bytes of a row that are transposed at a time.
pub(super) const SEGMENT: usize = 64;

/// Transposes a part of a row-major matrix of bytes, in words of four neighbouring bytes of a row. Words beyond the
/// last of `rows` and bytes beyond `count` (at most [`SEGMENT`]) are zero. `bytes` start at the first byte of the first
/// row.
#[inline(always)]
pub(super) fn transposed_words<S: Sums>(
    bytes: &[i8],
    stride: usize,
    rows: usize,
    count: usize,
) -> [Lanes<u32>; SEGMENT / 4] {
    let mut words: [Lanes<u32>; SEGMENT / 4] = [[[0; 16]; 2]; SEGMENT / 4];
    for half in 0..2 {
        let mut square = [[0u32; 16]; 16];
        for (lane, square) in square.iter_mut().enumerate() {
            let row = half * 16 + lane;
            if row < rows {
                *square = row_of_words(&bytes[row * stride..][..count]);
            }
        }
        for (words, column) in words.iter_mut().zip(S::transposed(square)) {
            words[half] = column;
        }
    }
    words
}

#[inline(always)]
fn row_of_words(bytes: &[i8]) -> [u32; 16] {
    match bytes.first_chunk::<SEGMENT>() {
        Some(bytes) => bytemuck::cast(*bytes),
        None => {
            let mut padded = [0i8; SEGMENT];
            padded[..bytes.len()].copy_from_slice(bytes);
            bytemuck::cast(padded)
        }
    }
}
