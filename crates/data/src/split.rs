//! Holds out rows for validation: the same rows for the same seed on every machine.

use super::error::DataError;
use super::random::{Purpose, generator, permutation};
use super::rows::Row;

/// Splits rows into `(training, validation)`, each in the order of the file.
///
/// `val_set_size` is a fraction of the rows below 1 (rounded up), or a number of rows from 1; 0 holds out none.
/// Which rows depends on `seed` and the number of rows only.
///
/// # Errors
///
/// [`DataError::Split`] if nothing is left to train on.
pub fn split(
    rows: Vec<Row>,
    val_set_size: f64,
    seed: u64,
) -> Result<(Vec<Row>, Vec<Row>), DataError> {
    let count = match val_set_size {
        size if size < 1.0 => (size.max(0.0) * rows.len() as f64).ceil(),
        size => size.floor(),
    } as usize;
    if count >= rows.len() {
        return Err(DataError::Split {
            val_set_size,
            validation: count,
            rows: rows.len(),
        });
    }
    let mut validates = vec![false; rows.len()];
    for row in &permutation(rows.len(), &mut generator(seed, Purpose::Split, 0))[..count] {
        validates[*row] = true;
    }
    let (mut training, mut validation) = (Vec::new(), Vec::new());
    for (row, validates) in rows.into_iter().zip(validates) {
        if validates {
            validation.push(row)
        } else {
            training.push(row)
        }
    }
    Ok((training, validation))
}

/// A random sample of the rows, in the order of the file; all rows if there are not more. It depends on `seed` and the
/// number of rows only.
pub fn sample(rows: Vec<Row>, count: usize, seed: u64) -> Vec<Row> {
    if count >= rows.len() {
        return rows;
    }
    let mut taken = vec![false; rows.len()];
    for row in &permutation(rows.len(), &mut generator(seed, Purpose::Sample, 0))[..count] {
        taken[*row] = true;
    }
    let rows = rows.into_iter().zip(taken);
    rows.filter_map(|(row, taken)| taken.then_some(row))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize) -> Vec<Row> {
        let row = |line: usize| Row::answer(line, line.to_string(), "x");
        (1..=n).map(row).collect()
    }

    fn lines(rows: &[Row]) -> Vec<usize> {
        rows.iter().map(|row| row.line).collect()
    }

    #[test]
    fn every_row_is_on_exactly_one_side_in_the_order_of_the_file() {
        let (training, validation) = split(rows(101), 0.1, 42).unwrap();
        assert_eq!((training.len(), validation.len()), (90, 11));
        assert!(lines(&training).is_sorted() && lines(&validation).is_sorted());
        let mut all = [lines(&training), lines(&validation)].concat();
        all.sort_unstable();
        assert_eq!(all, lines(&rows(101)));
    }

    #[test]
    fn the_seed_decides_which_rows() {
        let validation = |seed| lines(&split(rows(50), 5.0, seed).unwrap().1);
        assert_eq!(validation(1), validation(1));
        assert_ne!(validation(1), validation(2));
        assert_eq!(validation(1).len(), 5);
    }

    #[test]
    fn a_sample_has_so_many_rows_in_the_order_of_the_file() {
        let taken = lines(&sample(rows(100), 30, 1));
        assert!(taken.len() == 30 && taken.is_sorted());
        assert_eq!(lines(&sample(rows(100), 30, 1)), taken);
        assert_ne!(lines(&sample(rows(100), 30, 2)), taken);
        assert_eq!(lines(&sample(rows(3), 9, 1)), [1, 2, 3]);
    }

    #[test]
    fn zero_takes_nothing_and_everything_is_an_error() {
        assert!(split(rows(3), 0.0, 1).unwrap().1.is_empty());
        let error = split(rows(3), 3.0, 1).unwrap_err().to_string();
        assert!(
            error.contains("val_set_size = 3 holds out 3 of 3 examples"),
            "{error}"
        );
        assert!(split(rows(1), 0.5, 1).is_err());
    }
}
