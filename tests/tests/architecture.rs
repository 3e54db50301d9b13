//! The invariants of ARCHITECTURE.md and CONTRIBUTING.md that can be read off the files: which crate
//! depends on which, how large crates are, what they name, and that the documents' links lead somewhere.
//!
//! Only the standard library is used, so that the checks run in a second with
//! `rustc --test --edition 2024` as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Largest number of lines in the sources of a crate.
const LARGEST_CRATE: usize = 13_000;

/// Crates that must not name a backend, outside of tests and comments.
const WITHOUT_BACKENDS: [&str; 19] = [
    "panics",
    "durable",
    "terminal",
    "hub",
    "lora-core",
    "llama-burn",
    "train-step",
    "command-line",
    "data",
    "peft",
    "run-config",
    "lora-train",
    "export",
    "inference",
    "parity",
    "bench",
    "make-assets",
    "trainer",
    "pack",
];

/// Words that name a backend, or that ask for one.
const BACKENDS: [&str; 7] = [
    "Flex",
    "Cube",
    "CubeBackend",
    "NdArray",
    "is_native",
    "is_on_cpu",
    "is_cpu",
];

/// Names of adapters' methods, and of their tensors, which only their own files write, outside of tests and comments.
const METHODS: [&str; 8] = [
    "dora",
    "DoRA",
    "Dora",
    "magnitude_vector",
    "vera",
    "VeRA",
    "Vera",
    "VERA",
];

/// Tables that list the methods or the keys of a configuration.
const LISTS_OF_METHODS: [&str; 5] = [
    "lora-core/src/method/mod.rs",
    "lora-core/src/lib.rs",
    "run-config/src/keys.rs",
    "run-config/src/kinds/adapter.rs",
    "run-config/src/pages.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files with this ending in a folder and the folders in it, hidden ones and build outputs left out.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for path in entries.map(|entry| entry.expect("the folder can be read").path()) {
        let name = path.file_name().unwrap().to_string_lossy().to_string();
        if path.is_dir() {
            let skipped = name.starts_with('.') || ["target", "shared"].contains(&&name[..]);
            if !skipped {
                found.extend(files(&path, ending));
            }
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The crates of the workspace, by the names of their folders.
fn crates() -> BTreeSet<String> {
    let entries = fs::read_dir(root().join("crates")).unwrap();
    entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// Lines of a crate's sources: code, comments and unit tests.
fn lines(name: &str) -> usize {
    let sources = files(&root().join("crates").join(name).join("src"), ".rs");
    sources.iter().map(|file| read(file).lines().count()).sum()
}

/// Names of everything that a manifest depends on, for builds and for tests, on any platform.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            inside = section.trim_end_matches(']').ends_with("dependencies");
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
            names.insert(name.trim_matches('"').to_string());
        }
    }
    names
}

fn dependencies_of(name: &str) -> BTreeSet<String> {
    dependencies(&read(&root().join("crates").join(name).join("Cargo.toml")))
}

/// The rows of ARCHITECTURE.md's table of crates: name and lines, from top to bottom.
fn table(text: &str) -> Vec<(String, usize)> {
    let rows = text.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().strip_suffix('`')?;
        let lines = cells.next()?.trim().replace(',', "").parse().ok()?;
        Some((name.to_string(), lines))
    });
    rows.collect()
}

fn architecture() -> Vec<(String, usize)> {
    table(&read(&root().join("ARCHITECTURE.md")))
}

/// Fails with all problems, one per line.
fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn a_crate_depends_only_on_crates_above_it_in_the_table() {
    let order: Vec<String> = architecture().into_iter().map(|(name, _)| name).collect();
    let all = crates();
    let mut problems = Vec::new();
    for (place, name) in order.iter().enumerate() {
        let above = &order[..place];
        for dependency in dependencies_of(name) {
            if all.contains(&dependency) && !above.contains(&dependency) {
                problems.push(format!(
                    "{name} depends on {dependency}, which is not above it in ARCHITECTURE.md"
                ));
            }
        }
    }
    none(&problems);
}

#[test]
fn the_table_names_every_crate_with_its_lines() {
    let table: BTreeMap<String, usize> = architecture().into_iter().collect();
    let mut problems = Vec::new();
    for name in crates() {
        let (counted, written) = (lines(&name), table.get(&name));
        match written {
            None => problems.push(format!(
                "{name} ({counted} lines) is not in the table of ARCHITECTURE.md"
            )),
            Some(written) if counted.abs_diff(*written) * 10 > counted => problems.push(format!(
                "{name} has {counted} lines, ARCHITECTURE.md says {written}"
            )),
            Some(_) => {}
        }
    }
    for name in table.keys().filter(|name| !crates().contains(*name)) {
        problems.push(format!("ARCHITECTURE.md names a crate {name}"));
    }
    none(&problems);
}

#[test]
fn no_crate_is_larger_than_a_reader_can_take_in() {
    let mut problems = Vec::new();
    for name in crates() {
        let lines = lines(&name);
        if lines > LARGEST_CRATE {
            problems.push(format!(
                "{name} has {lines} lines, more than {LARGEST_CRATE}"
            ));
        }
    }
    none(&problems);
}

#[test]
fn libraries_do_not_depend_on_anyhow() {
    let mut problems = Vec::new();
    for name in crates() {
        let source = root().join("crates").join(&name).join("src");
        let program = source.join("main.rs").is_file() || source.join("bin").is_dir();
        let anyhow = dependencies_of(&name).contains("anyhow");
        if anyhow && !program {
            problems.push(format!(
                "{name} is a library and depends on anyhow; libraries return thiserror enums"
            ));
        }
    }
    none(&problems);
}

/// The code of a source file, without comments and without its module of unit tests, which is the last.
fn code(source: &str) -> String {
    let mut marks = source.match_indices("#[cfg(test)]\n");
    let tests = marks.find(|(at, mark)| {
        let next = source[at + mark.len()..].lines().next().unwrap_or_default();
        next.contains("mod ") && next.ends_with('{')
    });
    let end = tests.map_or(source.len(), |(at, _)| at);
    let lines = source[..end]
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

fn words(code: &str) -> BTreeSet<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
        .collect()
}

#[test]
fn only_some_crates_name_a_backend() {
    let mut problems = Vec::new();
    for name in WITHOUT_BACKENDS {
        assert!(crates().contains(name), "there is no crate {name}");
        for file in files(&root().join("crates").join(name).join("src"), ".rs") {
            if file.ends_with("tests.rs") {
                continue;
            }
            let code = code(&read(&file));
            let words = words(&code);
            for word in BACKENDS.iter().filter(|word| words.contains(*word)) {
                problems.push(format!("{} names {word}", file.display()));
            }
        }
    }
    none(&problems);
}

/// Words of model families, and the files whose code names them: the families' own, the list of families, and tables
/// of names that other programs write.
const FAMILIES: [(&str, &[&str]); 2] = [
    (
        "mistral",
        &[
            "crates/llama-burn/src/family/mistral.rs",
            "crates/llama-burn/src/family/mod.rs",
            "crates/run-config/src/axolotl/keys.rs",
        ],
    ),
    (
        "qwen",
        &[
            "crates/data/src/gguf/pre_tokenizer.rs",
            "crates/llama-burn/src/family/mod.rs",
            "crates/llama-burn/src/family/qwen2.rs",
            "crates/llama-burn/src/family/qwen3.rs",
            "crates/run-config/src/axolotl/keys.rs",
        ],
    ),
];

#[test]
fn a_model_family_is_named_in_its_own_file_and_in_lists_only() {
    let root = root();
    let sources = ["crates", "xtask"].map(|folder| files(&root.join(folder), ".rs"));
    let sources: Vec<(String, String)> = sources
        .concat()
        .into_iter()
        .filter(|file| !file.ends_with("tests.rs"))
        .map(|file| {
            let name = file.strip_prefix(&root).unwrap().display().to_string();
            (name, code(&read(&file)).to_lowercase())
        })
        .collect();
    for (family, own) in FAMILIES {
        let named = sources.iter().filter(|(_, code)| code.contains(family));
        let named: BTreeSet<&str> = named.map(|(name, _)| &name[..]).collect();
        assert_eq!(named, own.iter().copied().collect(), "{family}");
    }
}

/// A Markdown document without its code: fenced blocks, indented blocks, and `spans`.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            continue;
        }
        if fenced || line.starts_with("    ") {
            continue;
        }
        // Every second part is between backticks.
        for outside in line.split('`').step_by(2) {
            prose.push_str(outside);
        }
        prose.push('\n');
    }
    prose
}

/// The targets of a document's links, `[text](target)`.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let ends = prose.match_indices("](").map(|(at, link)| at + link.len());
    ends.filter_map(|start| {
        let target = prose[start..].split([')', '\n', ' ']).next()?;
        Some(target.to_string())
    })
    .collect()
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading == line || !heading.starts_with(' ') {
            continue;
        }
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
            _ => None,
        });
        let anchor: String = kept.collect();
        let again = (1..).map(|n| format!("{anchor}-{n}"));
        let mut names = std::iter::once(anchor.clone()).chain(again);
        anchors.insert(names.find(|name| !anchors.contains(name)).unwrap());
    }
    anchors
}

/// Resolves `..` without asking the file system, so that a message is readable.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if plain.file_name().is_some() => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn every_link_of_the_documents_leads_to_a_file_and_a_heading() {
    let root = root().canonicalize().unwrap();
    let mut problems = Vec::new();
    let documents = files(&root, ".md");
    assert!(documents.len() > 10, "{documents:?}");
    let mut checked = 0;
    for document in &documents {
        for link in links(&read(document)) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            checked += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() {
                document.clone()
            } else {
                plain(&document.with_file_name(path))
            };
            let wrong = |what: &str| {
                let document = document.strip_prefix(&root).unwrap().display();
                format!("{document}: ({link}): {what}")
            };
            let is_document = target.extension().is_some_and(|end| end == "md");
            if !target.exists() {
                problems.push(wrong("there is no such file"));
            } else if is_document && !anchor.is_empty() && !anchors(&read(&target)).contains(anchor)
            {
                problems.push(wrong("there is no such heading"));
            }
        }
    }
    assert!(checked > 20, "only {checked} links were found");
    none(&problems);
}

// The readers of these checks.

/// Whether the text names a method. A key of a configuration, PEFT's or this project's, does not count.
fn names_a_method(text: &str) -> bool {
    let text = text.replace("use_dora", "");
    METHODS.iter().any(|method| {
        let mut found = text.match_indices(method);
        found.any(|(at, _)| {
            // Not in "several", "Average" or "OVERALL"; a word begins at a capital after a small letter too.
            let before = text[..at].chars().next_back().unwrap_or(' ');
            let capital = method.starts_with(char::is_uppercase);
            !before.is_alphabetic() || (capital && before.is_lowercase())
        })
    })
}

#[test]
fn only_its_own_file_names_a_method() {
    let mut problems = Vec::new();
    let mut lists = BTreeSet::new();
    for file in files(&root().join("crates"), ".rs") {
        let name = file.display().to_string().replace('\\', "/");
        let own = METHODS
            .iter()
            .any(|method| name.ends_with(&format!("/method/{method}.rs")));
        let list = LISTS_OF_METHODS.iter().find(|list| name.ends_with(**list));
        let is_code = name.contains("/src/") && !name.ends_with("tests.rs");
        if own || !is_code || !names_a_method(&code(&read(&file))) {
            continue;
        }
        match list {
            Some(list) => drop(lists.insert(*list)),
            None => problems.push(format!("{name} names a method; ask lora_core::Method")),
        }
    }
    for list in LISTS_OF_METHODS {
        if !lists.contains(list) {
            problems.push(format!(
                "{list} names no method any more; remove it from the test"
            ));
        }
    }
    none(&problems);
    assert!(names_a_method("Some(Dora::new())") && names_a_method("x.lora_magnitude_vector"));
    assert!(names_a_method("AsVera") && names_a_method("\"VERA\"") && names_a_method("vera_A"));
    assert!(!names_a_method("peft_use_dora"));
    assert!(!names_a_method("several, Average, OVERALL"));
}

#[test]
fn a_manifest_has_all_its_dependencies_read() {
    let manifest = "[package]\nname = \"x\"\n\n[dependencies]\n# A comment.\nanyhow.workspace = true\n\
                    burn = { version = \"1\" }\n\n[target.'cfg(unix)'.dependencies]\nlibc = \"1\"\n\n\
                    [dev-dependencies]\ntempfile.workspace = true\n\n[lints]\nworkspace = true\n";
    let expected = ["anyhow", "burn", "libc", "tempfile"].map(String::from);
    assert_eq!(dependencies(manifest), expected.into());
    let table = table(
        "| crate | lines | job |\n| --- | ---: | --- |\n| `a-b` | 1,200 | x |\n| `f.rs` | y |\n",
    );
    assert_eq!(table, [("a-b".to_string(), 1200)]);
}

#[test]
fn comments_and_tests_do_not_count_as_code() {
    let source = "//! Flex\n#[cfg(test)]\nmod tests;\nuse x::Flexible; // Cube\nfn is_native() {}\n\
                  #[cfg(test)]\nmod more_tests {\n    Flex\n}\n";
    let code = code(source);
    let words = words(&code);
    let named: Vec<_> = BACKENDS
        .iter()
        .filter(|word| words.contains(*word))
        .collect();
    assert_eq!(named, [&"is_native"]);
}

#[test]
fn links_and_headings_are_those_that_github_shows() {
    let text = "# A `b` & c\n\n[x](a.md#b) `[y](no.md)` ![z](i.png \"title\")\n\n```\n# no\n[n](no)\n```\n\n## A\n## A\n";
    assert_eq!(links(text), ["a.md#b", "i.png"]);
    let expected = ["a-b--c", "a", "a-1"].map(String::from);
    assert_eq!(anchors(text), expected.into());
}
