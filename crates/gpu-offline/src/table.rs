//! The table of compiled kernels, in Markdown.

use crate::assembly::{Instructions, Resources};
use crate::occupancy::{Limit, Multiprocessor, Needs, occupancy};

/// A kernel on a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The kernel and its settings.
    pub kernel: String,
    /// Where it was compiled for.
    pub target: Multiprocessor,
    /// Threads of a workgroup.
    pub threads: u32,
    /// Shared memory that the launch asks for, in bytes, beside what the code declares.
    pub dynamic_shared: u32,
    /// What the assembler reports.
    pub resources: Resources,
    /// The registers with which the assembler spills none, if it spills with the number that it chose: fewer registers,
    /// so that more workgroups fit. `None` if it spills with every number.
    pub without_spills: Option<u32>,
    /// What the disassembler shows.
    pub instructions: Instructions,
}

impl Row {
    /// Whether registers were spilled.
    pub fn spills(&self) -> bool {
        self.resources.spill_stores + self.resources.spill_loads > 0
    }

    /// Whether registers were spilled and had to be: a thread has no more.
    pub fn has_to_spill(&self) -> bool {
        self.spills() && self.without_spills.is_none()
    }

    /// Shared memory of a workgroup in bytes.
    pub fn shared(&self) -> u32 {
        self.dynamic_shared + self.resources.shared
    }

    fn cells(&self) -> [String; 10] {
        let needs = Needs {
            threads: self.threads,
            registers: self.resources.registers,
            shared: self.shared(),
        };
        let fits = occupancy(&self.target, needs);
        let limits: Vec<&str> = fits.limits.iter().map(|limit| limit.name()).collect();
        // With every warp taken, what else is used up does not matter.
        let full = fits.limits.contains(&Limit::Threads);
        let limits = if full {
            Limit::Threads.name().into()
        } else {
            limits.join(", ")
        };
        [
            self.threads.to_string(),
            self.resources.registers.to_string(),
            format!(
                "{}/{}",
                self.resources.spill_stores, self.resources.spill_loads
            ),
            self.resources.stack.to_string(),
            self.shared().to_string(),
            fits.blocks.to_string(),
            format!("{}/{}", fits.warps, self.target.warps),
            limits,
            self.instructions.matrix.to_string(),
            self.instructions.async_copies.to_string(),
        ]
    }
}

const HEAD: [&str; 11] = [
    "kernel",
    "threads",
    "registers",
    "spilled",
    "local",
    "shared",
    "workgroups",
    "warps",
    "limited by",
    "matrix",
    "async",
];

/// The table: a line per kernel. A cell has one value per GPU, in their order, or one that is the same on all.
///
/// Rows of a kernel follow each other.
pub fn markdown(rows: &[Row]) -> String {
    let mut lines = vec![
        format!("| {} |", HEAD.join(" | ")),
        format!("| --- | {}", "---: | ".repeat(7)) + "--- | ---: | ---: |",
    ];
    for same_kernel in rows.chunk_by(|a, b| a.kernel == b.kernel) {
        let cells: Vec<_> = same_kernel.iter().map(Row::cells).collect();
        let columns = (0..HEAD.len() - 1).map(|column| {
            let mut values: Vec<&str> = cells.iter().map(|row| row[column].as_str()).collect();
            if values.windows(2).all(|pair| pair[0] == pair[1]) {
                values.truncate(1);
            }
            values.join(" · ")
        });
        let columns: Vec<_> = columns.collect();
        lines.push(format!(
            "| {} | {} |",
            same_kernel[0].kernel,
            columns.join(" | ")
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::occupancy::MULTIPROCESSORS;

    #[test]
    fn a_line_holds_the_values_of_all_gpus() {
        let row = |target: usize, registers: u32| Row {
            kernel: "product".into(),
            target: MULTIPROCESSORS[target],
            threads: 64,
            dynamic_shared: 9216,
            without_spills: None,
            resources: Resources {
                registers,
                shared: 0,
                ..Default::default()
            },
            instructions: Instructions::default(),
        };
        let table = markdown(&[row(0, 128), row(1, 128), row(2, 126)]);
        let line = table.lines().nth(2).expect("a row");
        assert_eq!(
            line,
            "| product | 64 | 128 · 128 · 126 | 0/0 | 0 | 9216 | 8 | 16/64 · 16/48 · 16/64 | registers | 0 | 0 |"
        );
        let columns = |line: &str| line.matches('|').count();
        assert!(
            table.lines().all(|other| columns(other) == columns(line)),
            "{table}"
        );
    }
}
