//! Evaluation by asking: which option a model finds likeliest, what it writes, and what files may hold.

use crate::common::{complete, logits, open_exact, tiny_chat_model};
use pocketlora::eval::{
    Ask, Expected, LabelBy, Metric, Record, TaskOptions, TaskReport, general, metrics_for, read_records, run_tasks,
};
use pocketlora::{Answer, Engine, ErrorCode, internals};
use std::fs;

fn engine() -> (tempfile::TempDir, Engine) {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_chat_model(dir.path());
    let engine = open_exact(&model, 1);
    (dir, engine)
}

fn record(line: usize, ask: &str, expected: Expected) -> Record {
    Record { line, ask: Ask::Text(ask.to_owned()), expected }
}

/// Runs the metrics that are usual for the records, and whatever else fits.
fn run(engine: &Engine, records: &[Record], asked: &[Metric], options: &TaskOptions) -> TaskReport {
    let metrics = metrics_for(records, asked).unwrap();
    run_tasks(engine, records, &metrics, options, &mut |_| true).unwrap()
}

fn score(report: &TaskReport, name: &str) -> f64 {
    report.scores.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name} in {:?}", report.scores)).1
}

/// Log-likelihood of `option` after `prompt`, from the logits of the whole text.
fn likelihood(engine: &Engine, prompt: &str, option: &str) -> f64 {
    let encode = |text: &str| engine.text().unwrap().tokenizer.encode(text, true).unwrap();
    let (given, ids) = (encode(prompt).len(), encode(&format!("{prompt}{option}")));
    let (all, vocab) = (logits(engine, &ids), internals::base(engine).model.config().vocab_size);
    let one = |i: usize| {
        let row = &all[(i - 1) * vocab..i * vocab];
        let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        f64::from(row[ids[i] as usize]) - sum.ln()
    };
    (given..ids.len()).map(one).sum()
}

fn argmax(values: &[f64]) -> usize {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
}

#[test]
fn the_likeliest_option_is_chosen() {
    let (_dir, engine) = engine();
    let choices = ["x", "a longer one", "mid", "zzzz"].map(str::to_owned).to_vec();
    let prompts = ["which", "Question: is it?\nAnswer:", "1 + 1 =", "say a word:", "so", "x"];
    let (mut by_sum, mut by_length, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for (i, prompt) in prompts.iter().enumerate() {
        // A space comes between a text and what continues it.
        let found: Vec<f64> = choices.iter().map(|c| likelihood(&engine, prompt, &format!(" {c}"))).collect();
        let each: Vec<f64> = found.iter().zip(&choices).map(|(l, c)| l / c.len() as f64).collect();
        by_sum.push(argmax(&found));
        by_length.push(argmax(&each));
        // Every other record has a wrong answer.
        let answer = (by_sum[i] + i % 2) % choices.len();
        records.push(record(i + 1, prompt, Expected::Choice { choices: choices.clone(), answer }));
    }
    assert_ne!(by_sum, by_length, "the two ways must differ for this test to tell them apart");
    let report = run(&engine, &records, &[], &TaskOptions::default());
    assert_eq!(score(&report, "choice"), 0.5);
    let right = (0..prompts.len()).filter(|&i| by_length[i] == (by_sum[i] + i % 2) % choices.len()).count();
    assert_eq!(score(&report, "choice_norm"), right as f64 / prompts.len() as f64);
    let naive: usize = prompts.iter().flat_map(|p| choices.iter().map(move |c| p.len() + c.len())).sum();
    assert!(report.prompt_tokens < naive, "{} tokens of {naive}: a prompt is run once", report.prompt_tokens);
}

#[test]
fn labels_are_read_by_likelihood_or_by_what_is_written() {
    let (_dir, engine) = engine();
    let prompts = ["ab", "cd", "efg"];
    let labels = ["yes", "no"].map(str::to_owned);
    let likeliest = |p: &&str| argmax(&labels.each_ref().map(|l| likelihood(&engine, p, &format!(" {l}"))));
    let mut expected: Vec<usize> = prompts.iter().map(likeliest).collect();
    expected[0] = 1 - expected[0];
    // Both labels must occur, for the set is what the file holds.
    let extra = record(4, "ab", Expected::Label(labels[1 - expected[0]].clone()));
    let mut records: Vec<Record> =
        (0..3).map(|i| record(i + 1, prompts[i], Expected::Label(labels[expected[i]].clone()))).collect();
    records.push(extra);
    let report = run(&engine, &records, &[], &TaskOptions::default());
    assert_eq!(score(&report, "accuracy"), 0.75);
    assert!(score(&report, "f1") > 0.0 && report.answers.is_empty());

    let options = TaskOptions { label_by: LabelBy::Generation, max_tokens: 4, ..TaskOptions::default() };
    let said = complete(&engine, "ab", 4).text;
    let first_line = said.trim().lines().next().unwrap().trim().to_owned();
    let written = [record(1, "ab", Expected::Label(first_line)), record(2, "cd", Expected::Label("never".into()))];
    let report = run(&engine, &written, &[Metric::Accuracy], &options);
    assert_eq!(report.scores, [("accuracy", 0.5)]);
    assert_eq!(report.answers[0], said.trim());
}

#[test]
fn what_is_written_is_compared_with_the_references() {
    let (_dir, engine) = engine();
    let Answer { text: said, generated: made, .. } = complete(&engine, "hello", 12);
    let options = TaskOptions { max_tokens: 12, ..TaskOptions::default() };
    let records = [
        record(1, "hello", Expected::References(vec!["something else".into(), said.clone()])),
        record(2, "hello", Expected::References(vec!["something else".into()])),
    ];
    let report = run(&engine, &records, &[], &options);
    assert_eq!(score(&report, "exact"), 0.5);
    for name in ["bleu", "rouge1", "rouge2", "rougeL"] {
        assert!(score(&report, name).is_finite(), "{name}");
    }
    assert_eq!((report.answers.len(), report.generated_tokens), (2, 2 * made.ids.len()));
}

#[test]
fn an_answer_is_right_that_holds_what_is_expected() {
    let (_dir, engine) = engine();
    let said = complete(&engine, "hello", 12).text;
    let part: String = said.trim().chars().skip(1).take(3).collect();
    let holding = |texts: &[&str]| Expected::Holding(texts.iter().map(|text| (*text).to_owned()).collect());
    let records = [
        record(1, "hello", holding(&["never said", &part.to_uppercase()])),
        record(2, "hello", holding(&["never said"])),
    ];
    let options = TaskOptions { max_tokens: 12, ..TaskOptions::default() };
    assert_eq!(run(&engine, &records, &[], &options).scores, [("expect", 0.5)], "{said:?}, {part:?}");
    assert!(metrics_for(&records, &[Metric::Exact]).is_err());
}

#[test]
fn a_file_holds_records_of_one_kind_and_metrics_must_fit_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let read = |lines: &str| {
        fs::write(&path, lines).unwrap();
        read_records(&path, false).map(|read| read.records)
    };
    let error = read("{\"prompt\":\"q\",\"label\":\"x\"}\n\n{\"prompt\":\"q\",\"reference\":\"x\"}\n").unwrap_err();
    assert_eq!(error.code(), ErrorCode::Data);
    assert!(error.place().contains("line 3"), "{error}");
    assert_eq!(read("\n").unwrap_err().code(), ErrorCode::Data);

    let labels = read("{\"prompt\":\"q\",\"label\":\"x\"}\n").unwrap();
    let error = metrics_for(&labels, &[Metric::Accuracy, Metric::Bleu]).unwrap_err();
    assert!(error.code() == ErrorCode::Config && error.to_string().contains("`bleu`"), "{error}");
    let taught = "{\"prompt\":\"q\",\"completion\":\"x\"}\n";
    assert_eq!(metrics_for(&read(taught).unwrap(), &[]).unwrap(), [Metric::Perplexity]);
    assert_eq!(metrics_for(&read(taught).unwrap(), &[Metric::Exact]).unwrap(), [Metric::Exact]);
    let mixed = read(&format!("{taught}{{\"text\":\"t\"}}\n")).unwrap();
    assert!(metrics_for(&mixed, &[Metric::Exact]).is_err(), "a text asks nothing");
}

#[test]
fn what_a_model_knows_in_general_is_asked_with_the_adapter_and_without() {
    let (_dir, engine) = engine();
    let mut heard = 0;
    let found = general(&engine, false, &mut |tokens| {
        heard += tokens;
        true
    })
    .unwrap();
    // Noise knows nothing, and finds no byte much likelier than others; some questions are longer than its context.
    assert!(found.asked > 10 && found.known.count() < 5, "{found:?}");
    assert!((found.text.nll() - 512f64.ln()).abs() < 3.0 && heard > found.text.tokens, "{found:?}, {heard} tokens");
    assert_eq!(general(&engine, true, &mut |_| true).unwrap(), found, "no adapter is attached");
    let error = general(&engine, false, &mut |_| false).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
}
