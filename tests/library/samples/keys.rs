//! What is done with each key of a record: it is used, refused by its name, or said not to be used.

use super::Reader;
use crate::common::check_all;
use pocketlora::ErrorCode;
use std::collections::BTreeMap;

fn reader() -> Reader {
    // It has no system text of its own.
    Reader::new(Some("qwen2"), "<|endoftext|>", "<|im_end|>", &|_| {
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}\
         {{ m.tool_calls | tojson }}{% endif %}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}"
            .to_owned()
    })
}

/// All text of the samples in a line of data.
fn texts(reader: &Reader, line: &str) -> Result<String, String> {
    let data = reader.read("a.jsonl", line, 4096).map_err(|e| e.to_string())?;
    Ok(data.samples.iter().map(|s| reader.text(&s.ids).replace("<|im_end|>", "")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn keys_are_used_whatever_their_names() {
    let reader = reader();
    let chat = "[user]q[assistant]r";
    let cases = [
        (r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#, chat),
        (r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"r"}]}"#, chat),
        (r#"{"Conversation":[{"Role":"User","Content":"q"},{"Role":"ChatGPT","Content":"r"}]}"#, chat),
        (r#"{"messages":[{"role":"human","content":"q"},{"role":"gpt","content":"r"}]}"#, chat),
        (r#"{"items":[{"from":"human","value":"q"},{"from":"bing","value":"r"}],"id":"x"}"#, chat),
        (r#"{"dialog":[{"speaker":"user","text":"q"},{"speaker":"model","text":"r"}],"turns":2}"#, chat),
        (r#"{"conversation":[{"human":"q","assistant":"r"}]}"#, chat),
        (
            r#"{"conversation":[{"system":"s","input":"q","output":"r"},{"input":"a","output":"b"}]}"#,
            "[system]s[user]q[assistant]r[user]a[assistant]b",
        ),
        (r#"{"conversations":"[{\"from\":\"human\",\"value\":\"q\"},{\"from\":\"gpt\",\"value\":\"r\"}]"}"#, chat),
        (r#"{"instruction":"q","output":"r"}"#, chat),
        (r#"{"Instruction":"q","Input":"","Output":"r"}"#, chat),
        (r#"{" instruction ":"q","OUTPUT":"r"}"#, chat),
        (r#"{"question":"q","answer":"r"}"#, chat),
        (r#"{"query":"q","response":"r"}"#, chat),
        (r#"{"prompt":"q","response":"r"}"#, chat),
        (r#"{"instruction":"q","completion":"r"}"#, chat),
        (r#"{"problem":"q","solution":"r"}"#, chat),
        (r#"{"input":"q","output":"r"}"#, chat),
        (r#"{"user":"q","assistant":"r"}"#, chat),
        (r#"{"instruction":"q","context":"c","response":"r"}"#, "[user]q\n\nc[assistant]r"),
        // The system's turn.
        (r#"{"system":"s","instruction":"q","output":"r"}"#, "[system]s[user]q[assistant]r"),
        (r#"{"system_prompt":"s","question":"q","response":"r"}"#, "[system]s[user]q[assistant]r"),
        (
            r#"{"systemPrompt":"s","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"r"}]}"#,
            "[system]s[user]q[assistant]r",
        ),
        (
            r#"{"system":"s","messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#,
            "[system]s[user]q[assistant]r",
        ),
        (r#"{"system":"","instruction":"q","output":"r","history":[],"tools":"[]","images":[],"weight":null}"#, chat),
        (
            r#"{"system":"s","prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"r"}]}"#,
            "[system]s[user]q[assistant]r",
        ),
        (r#"{"system":["s"],"instruction":"q","output":"r"}"#, "[system]s[user]q[assistant]r"),
        (
            r#"{"system":{"role":"system","content":"s"},"instruction":"q","output":"r"}"#,
            "[system]s[user]q[assistant]r",
        ),
        (r#"{"persona":"s","instruction":"q","output":"r"}"#, "[system]s[user]q[assistant]r"),
        (r#"{"sys":"s","document":"c","question":"q","answer":"r"}"#, "[system]s[user]q\n\nc[assistant]r"),
        (r#"{"instruction":"q","input":"  ","output":"r"}"#, chat),
        (r#"{"instruction":" ","input":"q","output":"r","previous":3,"article":12}"#, chat),
        // Earlier turns.
        (r#"{"instruction":"q","output":"r","past_turns":[["a","b"]]}"#, "[user]a[assistant]b[user]q[assistant]r"),
        (
            r#"{"instruction":"q","output":"r","history":[["a","b"]],"system":"s"}"#,
            "[system]s[user]a[assistant]b[user]q[assistant]r",
        ),
        (r#"{"instruction":"q","output":"r","history":"[[\"a\",\"b\"]]"}"#, "[user]a[assistant]b[user]q[assistant]r"),
        (
            r#"{"question":"q","answer":"r","chat_history":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
            "[user]a[assistant]b[user]q[assistant]r",
        ),
        // Tools.
        (r#"{"instruction":"q","output":"r","tools":[{"name":"f"}]}"#, r#"[{"name": "f"}][user]q[assistant]r"#),
        (
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"r"}],"tools":"[{\"name\":\"f\"}]"}"#,
            r#"[{"name": "f"}][user]q[assistant]r"#,
        ),
        (
            r#"{"instruction":"q","output":"r","functions":[{"name":"f"}]}"#,
            r#"[{"type": "function", "function": {"name": "f"}}][user]q[assistant]r"#,
        ),
        (
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"function_call","value":"{\"name\":\"f\",\"arguments\":{\"x\":1}}"},{"from":"observation","value":"o"},{"from":"gpt","value":"r"}]}"#,
            r#"[user]q[assistant][{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}][tool]o[assistant]r"#,
        ),
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"function_call":{"name":"f","arguments":"{\"x\":1}"}},{"role":"function","content":"o"},{"role":"assistant","content":"r"}]}"#,
            r#"[user]q[assistant][{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}][tool]o[assistant]r"#,
        ),
        // What is told twice.
        (r#"{"prompt":"q","messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#, chat),
        (r#"{"instruction":"q","output":"r","text":"Instruction: q Response: r"}"#, chat),
        (r#"{"problem":"q","solution":"because r","answer":"r"}"#, "[user]q[assistant]because r"),
        (r#"{"problem":"q","answer":"r","solution":"because r"}"#, "[user]q[assistant]because r"),
        (r#"{"question":"q","output":"r","response":"r"}"#, chat),
        // Weights that change nothing.
        (r#"{"instruction":"q","output":"r","ignore":false,"weights":1,"masked":false}"#, chat),
        (
            r#"{"messages":[{"role":"user","content":"q","skip":false},{"role":"assistant","content":[{"type":"text","text":"r","weight":1}],"prefix":false,"trained":true}]}"#,
            chat,
        ),
        // Silence that is not learned.
        (
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"","weight":0},{"role":"user","content":""},{"role":"assistant","content":"r"}]}"#,
            "[user]q[assistant][user][assistant]r",
        ),
        (r#"{"instruction":"q","output":"r","weight":1}"#, chat),
        (r#"{"instruction":"q","output":"r","weight":"1.0","train":true,"loss":0.7}"#, chat),
        (r#"{"user":"someone","prompt":"q","response":"r"}"#, chat),
    ];
    check_all(cases, |(line, expected)| {
        let found = texts(&reader, line);
        if found.as_deref().is_ok_and(|text| text == *expected) {
            Ok(())
        } else {
            Err(format!("{line}\n  {found:?}, expected {expected:?}"))
        }
    });
}

#[test]
fn what_cannot_be_honoured_is_refused_by_its_name() {
    let reader = reader();
    let turns = r#""messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]"#;
    let with = |rest: &str| format!("{{{turns},{rest}}}");
    let turn = |rest: &str| {
        format!(r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"r",{rest}}}]}}"#)
    };
    let cases = [
        (with(r#""images":["a.png"]"#), "`images`|only text"),
        (with(r#""weight":0.5"#), "`weight`|0.5"),
        (with(r#""context":"what is known of it""#), "`context`|another form"),
        (with(r#""text":"something else""#), "`text`"),
        (with(r#""prompt":"something else""#), "`prompt`"),
        (with(r#""history":[["a","b"]]"#), "`history`|whole conversation"),
        (with(r#""reasoning":"let me see""#), "`reasoning`|reasoning_content"),
        (with(r#""documents":[{"text":"d"}]"#), "`documents`"),
        (with(r#""chat_template_kwargs":{"enable_thinking":false}"#), "`chat_template_kwargs`"),
        (with(r#""tools":"no list""#), "tools|a list"),
        (with(r#""tools":[{"name":"f"}],"functions":[{"name":"f"}]"#), "functions|two"),
        (
            r#"{"system":"s","messages":[{"role":"system","content":"t"},{"role":"assistant","content":"r"}]}"#.into(),
            "`system`|another text",
        ),
        (r#"{"prompt":"p","completion":"c","system":"s"}"#.into(), "`system`|no turns"),
        (r#"{"text":"abc","system_prompt":"s"}"#.into(), "`system_prompt`"),
        (r#"{"text":"abc","history":[["a","b"]]}"#.into(), "`history`"),
        (r#"{"text":"abc","tools":[{"name":"f"}]}"#.into(), "`tools`"),
        (r#"{"text":"abc","label":1}"#.into(), "`label`|eval"),
        (r#"{"prompt":"p","completion":"c","label":true}"#.into(), "`label`"),
        (r#"{"prompt":"p","completion":"c","input":"i"}"#.into(), "`input`"),
        (r#"{"prompt":"p","chosen":"c","rejected":"d"}"#.into(), "`chosen`|preferences"),
        (r#"{"instruction":"p","question":"other","output":"r"}"#.into(), "`question`"),
        (r#"{"question":"p","output":"r","response":"other"}"#.into(), "`response`"),
        (r#"{"question":"q","input":"a","context":"b","answer":"r"}"#.into(), "`context`"),
        (r#"{"question":"q","options":["a","b"],"answer":"a"}"#.into(), "`options`"),
        (r#"{"question":"q","answer":"r","history":["a"]}"#.into(), "history|pairs"),
        (r#"{"question":"q","answer":4}"#.into(), "answer|a number"),
        (r#"{"prompt":"p","completion":"c","suffix":"s"}"#.into(), "`suffix`|gap"),
        (r#"{"input_ids":[1,2],"labels":[1,2]}"#.into(), "`input_ids`|tokens"),
        (r#"{"segments":[{"text":"a","label":true}]}"#.into(), "`segments`"),
        (r#"{"id":1,"lang":"de"}"#.into(), "got `id`, `lang`|rename"),
        (r#"{"prompt":"p"}"#.into(), "got `prompt`"),
        (turn(r#""weight":0.5"#), "turn 2|`weight`|0.5"),
        (turn(r#""masked":true"#), "turn 2|`masked`"),
        (turn(r#""mask":false"#), "turn 2|`mask`"),
        (turn(r#""prefix":true"#), "turn 2|`prefix`"),
        (turn(r#""weights":[0,1]"#), "turn 2|`weights`"),
        (turn(r#""content":"s""#), "`content` is given twice"),
        (turn(r#""weight":0,"weight":1"#), "`weight` is given twice"),
        (with(r#""tools":[{"name":"f","name":"g"}]"#), "`name` is given twice"),
        (with(r#""tools":"[{\"name\":\"f\",\"name\":\"g\"}]""#), "`name` is given twice"),
        (with(r#""loss_weights":[0,1]"#), "`loss_weights`"),
        (with(r#""document":"d""#), "`document`|another form"),
        (with(r#""instructions":"s""#), "`instructions`|`system`"),
        (with(r#""developer":["a","b"]"#), "developer|a list"),
        (with(r#""dialogue_history":[["a","b"]]"#), "`dialogue_history`|whole conversation"),
        (
            r#"{"messages":[{"role":"assistant","content":[{"type":"text","text":"r","weight":0},{"type":"text","text":"s"}]}]}"#.into(),
            "turn 1|`weight`|parts",
        ),
        (r#"{"instruction":"i","output":""}"#.into(), "line 1|answer"),
        (r#"{"prompt":"i","completion":" "}"#.into(), "line 1|completion"),
        (r#"{"text":"  "}"#.into(), "line 1|text"),
        (r#"{"text":""}"#.into(), "line 1|text"),
        (r#"{"instruction":"i","output":"o","history":[["a",""]]}"#.into(), "history|nothing"),
        (r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":" "}]}"#.into(), "turn 2|spaces"),
        (r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant"}]}"#.into(), "turn 2|`content`"),
        (r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[]}]}"#.into(), "turn 2|`content`"),
        (turn(r#""images":["x"]"#), "turn 2|`images`"),
        (turn(r#""value":"other""#), "turn 2|`content`|`value`"),
        (
            r#"{"messages":[{"role":"user","content":"q","train":true},{"role":"assistant","content":"r"}]}"#.into(),
            "turn 1|`train`|only the assistant",
        ),
        (r#"{"messages":[{"role":"narrator","content":"q"}]}"#.into(), "turn 1|`narrator`|`observation`"),
        (
            r#"{"messages":[{"from":"human","text":"q"},{"from":"function_call","value":"no call"}]}"#.into(),
            "turn 2|function_call",
        ),
        (r#"{"messages":["hello"]}"#.into(), "turn 1|a text"),
        (r#"{"messages":[{"name":"x"}]}"#.into(), "turn 1|`role`|`name`"),
        // Nothing is left to be learned of the only record.
        (with(r#""weight":0"#), "weight|1"),
        (with(r#""loss":0"#), "weight|1"),
        (with(r#""skip":true"#), "weight|1"),
        (turn(r#""loss_weight":0"#), "weight|1"),
        (turn(r#""is_trained":false"#), "weight|1"),
        (turn(r#""no-train":true"#), "weight|1"),
        (turn(r#""weight":0"#), "weight|1"),
    ];
    check_all(cases, |(line, words)| match reader.read("a.jsonl", line, 4096) {
        Ok(data) => Err(format!("{line}: accepted, not used: {:?}", data.unused)),
        Err(e) if e.code() != ErrorCode::Data => Err(format!("{line}: {e}")),
        Err(e) => {
            let message = e.to_string();
            words
                .split('|')
                .find(|w| !message.contains(*w))
                .map_or(Ok(()), |word| Err(format!("{line}: no `{word}` in: {message}")))
        }
    });
}

#[test]
fn keys_without_a_use_and_records_without_a_weight_are_said() {
    let reader = reader();
    let lines = r#"{"text":"abc","id":1,"lang":"de"}
{"id":2,"messages":[{"role":"user","content":"q","mood":"glad"},{"role":"assistant","content":"r","name":"x"}]}
{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"r","weight":0}]}
{"text":"def","train":false,"id":4}
{"instruction":"q","output":"r","text":"q: r"}"#;
    let data = reader.read("a.jsonl", lines, 4096).unwrap();
    let expected = [("id", 3), ("lang", 1), ("messages.mood", 1), ("text", 1)];
    let expected: BTreeMap<String, usize> = expected.into_iter().map(|(key, n)| (key.to_owned(), n)).collect();
    assert_eq!((&data.unused.keys, data.unused.records, data.records), (&expected, 2, 3));
    let text = data.unused.text();
    assert!(text.contains("keys not used: `id` (3), `lang` (1), `messages.mood` (1), `text` (1)\n"), "{text}");
    assert!(text.contains("weight is 0: 2\n"), "{text}");
    assert_eq!(reader.read("a.jsonl", "{\"text\":\"abc\"}", 4096).unwrap().unused.text(), "");
    // However many keys there are, they take little room.
    let many: String = (0..5000).map(|i| format!("{{\"text\":\"abc\",\"key{i}\":1}}\n")).collect();
    let data = reader.read("a.jsonl", many, 4096).unwrap();
    assert!(data.unused.keys.len() < 300 && data.unused.keys.values().sum::<usize>() == 5000);
}
