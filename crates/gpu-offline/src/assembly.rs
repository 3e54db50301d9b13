//! Reading what NVIDIA's assembler (`ptxas -v`) and disassembler (`nvdisasm`) print.

/// What `ptxas` reports of a kernel. Bytes are per thread, except those of shared memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory: arrays that are not in registers, and spilled registers.
    pub stack: u32,
    /// Bytes of registers that are stored to local memory for want of registers.
    pub spill_stores: u32,
    /// Bytes of such registers that are loaded.
    pub spill_loads: u32,
    /// Bytes of shared memory of a workgroup that are declared in the code.
    pub shared: u32,
}

/// Reads the output of `ptxas -v` for one kernel. Functions that were not inlined count too. `None` if there is no
/// line on registers.
pub fn resources(output: &str) -> Option<Resources> {
    let mut found = Resources::default();
    for line in output.lines() {
        if line.contains("bytes stack frame") {
            found.stack += number_before(line, " bytes stack frame").unwrap_or(0);
            found.spill_stores += number_before(line, " bytes spill stores").unwrap_or(0);
            found.spill_loads += number_before(line, " bytes spill loads").unwrap_or(0);
        }
        if let Some(registers) = number_before(line, " registers") {
            found.registers = found.registers.max(registers);
            found.shared += number_before(line, " bytes smem").unwrap_or(0);
        }
    }
    (found.registers > 0).then_some(found)
}

/// The same kernel with leave to use every register: the assembler spills rather than give up a workgroup of a
/// multiprocessor, unless the code asks for one workgroup only. `None` if there is no place to say so.
pub fn for_one_workgroup(ptx: &str) -> Option<String> {
    let bounds = |line: &&str| line.starts_with(".reqntid") || line.starts_with(".maxntid");
    let line = ptx.lines().find(bounds)?;
    Some(ptx.replacen(line, &format!("{line}\n.minnctapersm 1"), 1))
}

/// The number that stands before these words.
fn number_before(line: &str, words: &str) -> Option<u32> {
    let before = &line[..line.find(words)?];
    let digits = before
        .rfind(|c: char| !c.is_ascii_digit())
        .map_or(0, |at| at + 1);
    before[digits..].parse().ok()
}

/// Numbers of instructions in a kernel's machine code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Instructions {
    /// Products on matrix units.
    pub matrix: u32,
    /// Copies from global to shared memory that the program does not wait for.
    pub async_copies: u32,
    /// Accesses of local memory.
    pub local: u32,
    /// All.
    pub all: u32,
}

/// Counts instructions in the output of `nvdisasm`.
pub fn instructions(output: &str) -> Instructions {
    const MATRIX: [&str; 8] = [
        "HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA",
    ];
    const ASYNC: [&str; 3] = ["LDGSTS", "UBLKCP", "UTMALDG"];
    let mut counts = Instructions::default();
    for name in output.lines().filter_map(name_of_instruction) {
        let name = name.split('.').next().unwrap_or(name);
        counts.all += 1;
        counts.matrix += u32::from(MATRIX.contains(&name));
        counts.async_copies += u32::from(ASYNC.contains(&name));
        counts.local += u32::from(["LDL", "STL"].contains(&name));
    }
    counts
}

/// The instruction of a line such as `/*0010*/  @!P0 LDG.E R0, [R2.64] ;`.
fn name_of_instruction(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix("/*")?;
    let (address, rest) = rest.split_once("*/")?;
    let is_address = !address.is_empty() && address.chars().all(|c| c.is_ascii_hexdigit());
    let mut words = rest
        .split_whitespace()
        .filter(|word| !word.starts_with(['@', '{']));
    let name = words.next()?.trim_end_matches(';');
    (is_address && name.starts_with(|c: char| c.is_ascii_uppercase())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_and_spills_are_read() {
        let output = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'k' for 'sm_80'\n\
            ptxas info    : Function properties for k\n    \
            16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem\n\
            ptxas info    : Compile time = 80.196 ms\n";
        let expected = Resources {
            registers: 168,
            stack: 16,
            spill_stores: 12,
            spill_loads: 8,
            shared: 4096,
        };
        assert_eq!(resources(output), Some(expected));
        assert_eq!(
            resources("ptxas fatal   : Unresolved extern function"),
            None
        );
    }

    #[test]
    fn one_workgroup_is_asked_for_beside_its_size() {
        let ptx = ".visible .entry k()\n.reqntid 64, 1, 1\n{\n}";
        let expected = ".visible .entry k()\n.reqntid 64, 1, 1\n.minnctapersm 1\n{\n}";
        assert_eq!(for_one_workgroup(ptx).as_deref(), Some(expected));
        assert_eq!(for_one_workgroup(".entry k() {}"), None);
    }

    #[test]
    fn instructions_are_counted() {
        let output = "\t.section .text.k\n.L_x_0:\n\
            \x20       /*0000*/                   MOV R1, c[0x0][0x28] ;\n\
            \x20       /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;\n\
            \x20       /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;\n\
            \x20       /*0030*/                   { LDL R0, [R1] ;\n\
            \x20       /*0040*/                   EXIT;\n";
        let expected = Instructions {
            matrix: 1,
            async_copies: 1,
            local: 1,
            all: 5,
        };
        assert_eq!(instructions(output), expected);
    }
}
