//! [`attention`](super::attention) for drivers that emulate a GPU on a CPU. What is cheap there is described at
//! [`plane_product`](super::plane_product).
//!
//! A workgroup is one plane and handles the same 32 queries. A unit owns four of them (with eight units), all their
//! dimensions in registers, and keeps their maximum and sum to itself. Keys come in blocks of one per unit: each unit
//! reads a key, and broadcasts send it to all. For the gradients of keys and values the roles are exchanged.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::attention::{HIDDEN, KEYS, QUERIES, Shape, oldest, query_of};
use super::fault::Fault;

type F4 = Vector<f32, Const<4>>;

/// The row that unit `i` has read.
#[cube]
fn row_of_unit(mine: &Array<F4>, i: u32, #[comptime] vectors: usize) -> Array<F4> {
    let mut row = Array::<F4>::new(vectors);
    #[unroll]
    for inner in 0..vectors {
        row[inner] = plane_shuffle(mine[inner], i);
    }
    row
}

/// The product of a row and one of a unit's own.
#[cube]
fn dot(row: &Array<F4>, own: &Array<F4>, #[comptime] j: usize, #[comptime] vectors: usize) -> f32 {
    let mut sum = F4::new(0.0f32);
    #[unroll]
    for inner in 0..vectors {
        sum = fma(row[inner], own[comptime!(j * vectors + inner)], sum);
    }
    sum.extract(0usize) + sum.extract(1usize) + sum.extract(2usize) + sum.extract(3usize)
}

/// Adds a row times `weight` to one of a unit's own.
#[cube]
fn add_row(
    row: &Array<F4>,
    weight: f32,
    sums: &mut Array<F4>,
    #[comptime] j: usize,
    #[comptime] vectors: usize,
) {
    #[unroll]
    for inner in 0..vectors {
        let at = comptime!(j * vectors + inner);
        sums[at] = fma(F4::new(weight), row[inner], sums[at]);
    }
}

/// A unit's own rows in registers.
#[cube]
fn read_row<F: Float>(
    from: &[Vector<F, Const<4>>],
    at: usize,
    to: &mut Array<F4>,
    #[comptime] row: usize,
    #[comptime] vectors: usize,
) {
    #[unroll]
    for inner in 0..vectors {
        to[comptime!(row * vectors + inner)] = Vector::cast_from(from[at + inner]);
    }
}

/// Writes one of a unit's own rows.
#[cube]
fn write_row<F: Float>(
    from: &Array<F4>,
    factor: f32,
    to: &mut [Vector<F, Const<4>>],
    at: usize,
    #[comptime] row: usize,
    #[comptime] vectors: usize,
) {
    #[unroll]
    for inner in 0..vectors {
        let value = from[comptime!(row * vectors + inner)] * F4::new(factor);
        to[at + inner] = Vector::cast_from(value);
    }
}

#[cube]
fn zeros(#[comptime] length: usize) -> Array<F4> {
    let mut array = Array::<F4>::new(length);
    #[unroll]
    for i in 0..length {
        array[i] = F4::new(0.0f32);
    }
    array
}

/// Whether a query whose window begins at `oldest` sees a key, whose segment has the numbers `begin..end`.
#[cube]
fn is_visible(
    query: usize,
    query_begin: i32,
    oldest: usize,
    key: usize,
    begin: i32,
    end: i32,
    #[comptime] shape: Shape,
) -> bool {
    let same =
        comptime!(shape.fault() == Fault::Mask) || (begin <= query_begin && query_begin < end);
    let mut near = key <= query;
    if shape.window {
        near = near && key >= oldest;
    }
    near && same
}

/// The tokens and segments of a unit's queries, `n` for a row outside the batch, and where they lie.
#[derive(CubeType)]
struct Queries {
    token: Array<usize>,
    begin: Array<i32>,
    /// The first token of the sliding window.
    oldest: Array<usize>,
    /// The row of `[n · heads, d]`.
    row: Array<usize>,
}

#[cube]
fn queries(
    tables: &[i32],
    spans: usize,
    first: usize,
    n: usize,
    key_head: usize,
    #[comptime] shape: Shape,
    #[comptime] units: usize,
) -> Queries {
    let count = comptime!(QUERIES / units);
    let mut token = Array::<usize>::new(count);
    let mut begin = Array::<i32>::new(count);
    let mut oldest_of = Array::<usize>::new(count);
    let mut row = Array::<usize>::new(count);
    #[unroll]
    for j in 0..count {
        let (at, head) = query_of(UNIT_POS as usize * count + j, first, n, key_head, shape);
        let inside = min(at, n - 1);
        token[j] = at;
        begin[j] = tables[spans + inside];
        oldest_of[j] = oldest(tables, spans, inside, n, shape);
        row[j] = inside * comptime!(shape.heads()) + head;
    }
    Queries {
        token,
        begin,
        oldest: oldest_of,
        row,
    }
}

/// As [`attention::forward`](super::attention::forward).
#[cube(launch_unchecked)]
pub fn plane_forward<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    tables: &[i32],
    output: &mut [Vector<F, Const<4>>],
    log_sums: &mut [f32],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[comptime] units: usize,
    #[define(F)] _type: ElemType,
) {
    let vectors = comptime!(shape.d / 4);
    let count = comptime!(QUERIES / units);
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let mine = queries(tables, spans, first, n, key_head, shape, units);
    let mut own = Array::<F4>::new(comptime!(count * vectors));
    let mut sums = zeros(comptime!(count * vectors));
    let mut largest = Array::<f32>::new(count);
    let mut total = Array::<f32>::new(count);
    #[unroll]
    for j in 0..count {
        read_row::<F>(q, mine.row[j] * vectors, &mut own, j, vectors);
        largest[j] = HIDDEN;
        total[j] = 0.0f32;
    }

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        let end = min(first_key + KEYS, min(first + comptime!(shape.tokens()), n));
        for block in 0..(end - first_key).div_ceil(units) {
            let first_key = first_key + block * units;
            let key = min(first_key + UNIT_POS as usize, n - 1);
            let (key_begin, key_end) = (tables[spans + key], tables[spans + n + key]);
            let at = (key * shape.key_heads + key_head) * vectors;
            let mut mine_k = Array::<F4>::new(vectors);
            let mut mine_v = Array::<F4>::new(vectors);
            read_row::<F>(k, at, &mut mine_k, 0usize, vectors);
            read_row::<F>(v, at, &mut mine_v, 0usize, vectors);
            for i in 0..min(units, end - first_key) {
                let unit = i as u32;
                let k_row = row_of_unit(&mine_k, unit, vectors);
                let v_row = row_of_unit(&mine_v, unit, vectors);
                let begin = plane_shuffle(key_begin, unit);
                let end = plane_shuffle(key_end, unit);
                #[unroll]
                for j in 0..count {
                    let (token, query_begin) = (mine.token[j], mine.begin[j]);
                    let key = first_key + i;
                    let visible = token < n
                        && is_visible(token, query_begin, mine.oldest[j], key, begin, end, shape);
                    let score = select(visible, dot(&k_row, &own, j, vectors), HIDDEN);
                    let most = max(largest[j], score);
                    let mut factor = (largest[j] - most).exp();
                    let weight = select(visible, (score - most).exp(), 0.0f32);
                    total[j] = total[j] * factor + weight;
                    largest[j] = most;
                    if comptime!(shape.fault() == Fault::Correction) {
                        factor = 1.0f32;
                    }
                    #[unroll]
                    for inner in 0..vectors {
                        let at = comptime!(j * vectors + inner);
                        sums[at] = fma(F4::new(weight), v_row[inner], sums[at] * F4::new(factor));
                    }
                }
            }
        }
    }

    #[unroll]
    for j in 0..count {
        if mine.token[j] < n {
            let factor = 1.0f32 / total[j];
            write_row::<F>(&sums, factor, output, mine.row[j] * vectors, j, vectors);
            log_sums[mine.row[j]] = largest[j] + total[j].ln();
        }
    }
}

/// As [`attention::backward_queries`](super::attention::backward_queries).
#[cube(launch_unchecked)]
pub fn plane_backward_queries<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_q: &mut [Vector<F, Const<4>>],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[comptime] units: usize,
    #[define(F)] _type: ElemType,
) {
    let vectors = comptime!(shape.d / 4);
    let count = comptime!(QUERIES / units);
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first = tile * comptime!(shape.tokens());
    let mine = queries(tables, spans, first, n, key_head, shape, units);
    let mut own = Array::<F4>::new(comptime!(count * vectors));
    let mut own_gradient = Array::<F4>::new(comptime!(count * vectors));
    let mut sums = zeros(comptime!(count * vectors));
    let mut log_sum = Array::<f32>::new(count);
    let mut row_sum = Array::<f32>::new(count);
    #[unroll]
    for j in 0..count {
        read_row::<F>(q, mine.row[j] * vectors, &mut own, j, vectors);
        read_row::<F>(
            gradient,
            mine.row[j] * vectors,
            &mut own_gradient,
            j,
            vectors,
        );
        log_sum[j] = log_sums[mine.row[j]];
        row_sum[j] = row_sums[mine.row[j]];
    }

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first_key = tables[tiles + index as usize] as usize;
        let end = min(first_key + KEYS, min(first + comptime!(shape.tokens()), n));
        for block in 0..(end - first_key).div_ceil(units) {
            let first_key = first_key + block * units;
            let key = min(first_key + UNIT_POS as usize, n - 1);
            let (key_begin, key_end) = (tables[spans + key], tables[spans + n + key]);
            let at = (key * shape.key_heads + key_head) * vectors;
            let mut mine_k = Array::<F4>::new(vectors);
            let mut mine_v = Array::<F4>::new(vectors);
            read_row::<F>(k, at, &mut mine_k, 0usize, vectors);
            read_row::<F>(v, at, &mut mine_v, 0usize, vectors);
            for i in 0..min(units, end - first_key) {
                let unit = i as u32;
                let k_row = row_of_unit(&mine_k, unit, vectors);
                let v_row = row_of_unit(&mine_v, unit, vectors);
                let begin = plane_shuffle(key_begin, unit);
                let end = plane_shuffle(key_end, unit);
                #[unroll]
                for j in 0..count {
                    let (token, query_begin) = (mine.token[j], mine.begin[j]);
                    let key = first_key + i;
                    let visible = token < n
                        && is_visible(token, query_begin, mine.oldest[j], key, begin, end, shape);
                    let score = dot(&k_row, &own, j, vectors) - log_sum[j];
                    let weight = select(visible, score.exp(), 0.0f32);
                    let d_score = weight * (dot(&v_row, &own_gradient, j, vectors) - row_sum[j]);
                    add_row(&k_row, d_score, &mut sums, j, vectors);
                }
            }
        }
    }

    #[unroll]
    for j in 0..count {
        if mine.token[j] < n {
            write_row::<F>(&sums, 1.0f32, d_q, mine.row[j] * vectors, j, vectors);
        }
    }
}

/// As [`attention::backward_keys`](super::attention::backward_keys).
#[cube(launch_unchecked)]
pub fn plane_backward_keys<F: Float>(
    q: &[Vector<F, Const<4>>],
    k: &[Vector<F, Const<4>>],
    v: &[Vector<F, Const<4>>],
    gradient: &[Vector<F, Const<4>>],
    log_sums: &[f32],
    row_sums: &[f32],
    tables: &[i32],
    d_k: &mut [Vector<F, Const<4>>],
    d_v: &mut [Vector<F, Const<4>>],
    n: usize,
    spans: usize,
    tiles: usize,
    #[comptime] shape: Shape,
    #[comptime] units: usize,
    #[define(F)] _type: ElemType,
) {
    let vectors = comptime!(shape.d / 4);
    let count = comptime!(KEYS / units);
    let tile = CUBE_POS_X as usize;
    let key_head = CUBE_POS_Y as usize;
    let first_key = tile * KEYS;
    let mut key = Array::<usize>::new(count);
    let mut key_begin = Array::<i32>::new(count);
    let mut key_end = Array::<i32>::new(count);
    let mut own_k = Array::<F4>::new(comptime!(count * vectors));
    let mut own_v = Array::<F4>::new(comptime!(count * vectors));
    let mut k_sums = zeros(comptime!(count * vectors));
    let mut v_sums = zeros(comptime!(count * vectors));
    #[unroll]
    for j in 0..count {
        key[j] = first_key + UNIT_POS as usize * count + j;
        let inside = min(key[j], n - 1);
        key_begin[j] = tables[spans + inside];
        key_end[j] = tables[spans + n + inside];
        let at = (inside * shape.key_heads + key_head) * vectors;
        read_row::<F>(k, at, &mut own_k, j, vectors);
        read_row::<F>(v, at, &mut own_v, j, vectors);
    }

    for index in tables[tiles + tile]..tables[tiles + tile + 1] {
        let first = tables[tiles + index as usize] as usize;
        // Tokens before the first key do not see any.
        let hidden = (max(first, first_key) - first) * shape.group;
        for block in hidden / units..comptime!(QUERIES / units) {
            let row = block * units + UNIT_POS as usize;
            let (token, head) = query_of(row, first, n, key_head, shape);
            let inside = min(token, n - 1);
            let row = inside * comptime!(shape.heads()) + head;
            let (mine_begin, mine_log, mine_sum) =
                (tables[spans + inside], log_sums[row], row_sums[row]);
            let mine_oldest = oldest(tables, spans, inside, n, shape) as u32;
            let mut mine_q = Array::<F4>::new(vectors);
            let mut mine_gradient = Array::<F4>::new(vectors);
            read_row::<F>(q, row * vectors, &mut mine_q, 0usize, vectors);
            read_row::<F>(gradient, row * vectors, &mut mine_gradient, 0usize, vectors);
            for i in 0..units {
                let unit = i as u32;
                let q_row = row_of_unit(&mine_q, unit, vectors);
                let gradient_row = row_of_unit(&mine_gradient, unit, vectors);
                let begin = plane_shuffle(mine_begin, unit);
                let log_sum = plane_shuffle(mine_log, unit);
                let row_sum = plane_shuffle(mine_sum, unit);
                let query = plane_shuffle(token as u32, unit) as usize;
                let mut oldest = 0usize;
                if shape.window {
                    oldest = plane_shuffle(mine_oldest, unit) as usize;
                }
                #[unroll]
                for j in 0..count {
                    let (begins, ends) = (key_begin[j], key_end[j]);
                    let visible =
                        query < n && is_visible(query, begin, oldest, key[j], begins, ends, shape);
                    let score = dot(&q_row, &own_k, j, vectors) - log_sum;
                    let weight = select(visible, score.exp(), 0.0f32);
                    let d_score = weight * (dot(&gradient_row, &own_v, j, vectors) - row_sum);
                    add_row(&gradient_row, weight, &mut v_sums, j, vectors);
                    add_row(&q_row, d_score, &mut k_sums, j, vectors);
                }
            }
        }
    }

    #[unroll]
    for j in 0..count {
        if key[j] < n {
            let at = (key[j] * shape.key_heads + key_head) * vectors;
            write_row::<F>(&k_sums, 1.0f32, d_k, at, j, vectors);
            write_row::<F>(&v_sums, 1.0f32, d_v, at, j, vectors);
        }
    }
}
