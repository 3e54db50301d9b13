//! FinLoRA's tasks (`dataset_path` and `max_new_token_dict` in its `test/test_dataset.py`).

/// How a task's answers are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    /// A label: accuracy and weighted F1.
    Label,
    /// A comma-separated list, each item of which is a label.
    Labels,
    /// A text: BERTScore.
    Text,
}

/// A task of FinLoRA's.
#[derive(Debug, PartialEq, Eq)]
pub struct SuiteTask {
    /// FinLoRA's name.
    pub name: &'static str,
    /// The name of its file.
    pub file: &'static str,
    /// The maximum number of tokens per answer.
    pub max_new_tokens: usize,
    /// How answers are judged.
    pub judged: Judged,
}

const fn task(
    name: &'static str,
    file: &'static str,
    max_new_tokens: usize,
    judged: Judged,
) -> SuiteTask {
    SuiteTask {
        name,
        file,
        max_new_tokens,
        judged,
    }
}

/// Every task, in the order of FinLoRA's table of results. The exams have no answer length of their
/// own there and use its default, 30; their files are not published.
pub const TASKS: [SuiteTask; 19] = [
    task("fpb", "fpb_test.jsonl", 10, Judged::Label),
    task("fiqa", "fiqa_test.jsonl", 10, Judged::Label),
    task("tfns", "tfns_test.jsonl", 10, Judged::Label),
    task("nwgi", "nwgi_test.jsonl", 10, Judged::Label),
    task("ner", "ner_test.jsonl", 10, Judged::Label),
    task("headline", "headline_test.jsonl", 10, Judged::Label),
    task("cfa_level1", "cfa_level1_test.jsonl", 30, Judged::Label),
    task("cfa_level2", "cfa_level2_test.jsonl", 30, Judged::Label),
    task("cfa_level3", "cfa_level3_test.jsonl", 30, Judged::Label),
    task("cpa_reg", "cpa_reg_test.jsonl", 30, Judged::Label),
    task(
        "xbrl_finer",
        "finer_test_batched.jsonl",
        100,
        Judged::Labels,
    ),
    task("xbrl_fnxl", "fnxl_test_batched.jsonl", 100, Judged::Labels),
    task("xbrl_term", "xbrl_term_test.jsonl", 50, Judged::Text),
    task(
        "xbrl_tags_extract",
        "xbrl_extract_tags_test.jsonl",
        20,
        Judged::Label,
    ),
    task(
        "xbrl_value_extract",
        "xbrl_extract_value_test.jsonl",
        20,
        Judged::Label,
    ),
    task(
        "xbrl_formula_extract",
        "xbrl_extract_formula_test.jsonl",
        30,
        Judged::Label,
    ),
    task(
        "xbrl_formula_calc_extract",
        "xbrl_extract_formula_calculations_test.jsonl",
        30,
        Judged::Label,
    ),
    task("financebench", "financebench_test.jsonl", 50, Judged::Text),
    task("formula", "formula_test.jsonl", 50, Judged::Label),
];

/// The task of this name.
pub fn of_name(name: &str) -> Option<&'static SuiteTask> {
    TASKS.iter().find(|task| task.name == name)
}
