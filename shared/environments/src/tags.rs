//! Finds the answer that a completion gives between tags.
//!
//! The reference searches with Python's `re`, case ignored, and counts code points. Rust's `regex` folds case by other
//! rules (`i` and U+0130, U+0131), hence the matcher here.

use grail_text::python;

use crate::thinking::Tags;

/// What the tags of a completion say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaggedAnswer<'a> {
    /// Whether the reasoning was closed. The opening tag is never required.
    pub has_thinking: bool,
    /// Text between the answer tags, stripped; `None` without a complete pair.
    pub content: Option<&'a str>,
    /// Code points after the closing answer tag; 0 without one.
    pub trailing: usize,
}

/// Reads `completion` by `tags`: the first complete answer after the first end of reasoning; if there is none there, or no
/// end of reasoning, the first complete answer at all.
#[must_use]
pub fn find_answer<'a>(completion: &'a str, tags: &Tags) -> TaggedAnswer<'a> {
    // Here the reference compares lower-cased texts, which accepts fewer letters than its searches below.
    let has_thinking = completion.to_lowercase().contains(&tags.thinking_close.to_lowercase());
    let after_thinking = if has_thinking { find(completion, 0, tags.thinking_close) } else { None };
    let answer = after_thinking.and_then(|(_, end)| pair(completion, end, tags)).or_else(|| pair(completion, 0, tags));
    match answer {
        None => TaggedAnswer { has_thinking, content: None, trailing: 0 },
        Some((start, end, after)) => TaggedAnswer {
            has_thinking,
            content: Some(python::strip(&completion[start..end])),
            trailing: completion[after..].chars().count(),
        },
    }
}

/// First answer at or after byte `from`: start and end of its content, end of its closing tag.
fn pair(text: &str, from: usize, tags: &Tags) -> Option<(usize, usize, usize)> {
    let (_, start) = find(text, from, tags.solution_open)?;
    let (end, after) = find(text, start, tags.solution_close)?;
    Some((start, end, after))
}

/// Bytes of the first `tag` at or after `from`, case ignored.
fn find(text: &str, from: usize, tag: &str) -> Option<(usize, usize)> {
    // Every tag starts with `<`, which has one case only.
    text[from..].match_indices('<').find_map(|(offset, _)| {
        let start = from + offset;
        match_length(&text[start..], tag).map(|length| (start, start + length))
    })
}

/// Bytes of `tag` at the start of `text`.
fn match_length(text: &str, tag: &str) -> Option<usize> {
    let mut chars = text.chars();
    for expected in tag.chars() {
        if !is_same_letter(expected, chars.next()?) {
            return None;
        }
    }
    Some(text.len() - chars.as_str().len())
}

/// Whether `c` matches the ASCII character `expected` in CPython's `re` with IGNORECASE.
fn is_same_letter(expected: char, c: char) -> bool {
    expected.eq_ignore_ascii_case(&c)
        || match expected.to_ascii_lowercase() {
            'i' => matches!(c, '\u{130}' | '\u{131}'),
            'k' => c == '\u{212a}',
            's' => c == '\u{17f}',
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::thinking::ThinkingMode;

    fn read(text: &str) -> TaggedAnswer<'_> {
        find_answer(text, &ThinkingMode::Instructed.tags())
    }

    #[test]
    fn the_first_answer_after_the_reasoning_counts() {
        let text = "<SOLUTION>1</SOLUTION>x</end_working_out><SOLUTION> 2 </SOLUTION>éé<SOLUTION>3</SOLUTION>";
        assert_eq!(read(text), TaggedAnswer { has_thinking: true, content: Some("2"), trailing: 2 + 22 });
        let before = "<SOLUTION>1</SOLUTION>x</end_working_out><SOLUTION>2";
        assert_eq!(read(before), TaggedAnswer { has_thinking: true, content: Some("1"), trailing: 30 });
        assert_eq!(read("<SOLUTION><SOLUTION> 42</SOLUTION></SOLUTION>").content, Some("<SOLUTION> 42"));
        assert_eq!(read("</SOLUTION><SOLUTION>"), TaggedAnswer::default());
    }

    #[test]
    fn letters_match_as_in_python() {
        assert_eq!(read("<\u{17f}olut\u{131}on>7</SOLUT\u{130}ON>").content, Some("7"));
        assert!(read("</end_wor\u{212a}ing_out>").has_thinking);
        assert!(!read("</end_work\u{130}ng_out>").has_thinking);
        assert_eq!(find("x</end_work\u{131}ng_out>", 0, "</end_working_out>"), Some((1, 20)));
        let matching = |letter| ('\0'..=char::MAX).filter(move |c| is_same_letter(letter, *c)).collect::<String>();
        assert_eq!(
            [matching('i'), matching('S'), matching('k'), matching('a'), matching('_')],
            ["Ii\u{130}\u{131}", "Ss\u{17f}", "Kk\u{212a}", "Aa", "_"]
        );
    }

    /// Texts rich in tags and in letters of many bytes.
    fn text() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("<SOLUTION>".to_owned()),
            Just("</SOLUTION>".to_owned()),
            Just("</end_working_out>".to_owned()),
            Just("</think>".to_owned()),
            Just("<start_working_out>".to_owned()),
            Just("<soluT\u{131}on>".to_owned()),
            Just("<".to_owned()),
            "[0-9,.é\u{130}\u{1F600} \n]{0,6}",
            any::<String>(),
        ];
        prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn counts_are_code_points(text in text()) {
            for mode in ThinkingMode::ALL {
                let answer = find_answer(&text, &mode.tags());
                prop_assert!(answer.trailing <= text.chars().count());
                let Some(content) = answer.content else {
                    prop_assert_eq!(answer.trailing, 0);
                    continue;
                };
                // Everything after the closing tag is exactly `trailing` code points long, and the tag ends there.
                let boundary = text.char_indices().rev().take(answer.trailing).last().map_or(text.len(), |(at, _)| at);
                prop_assert!(text[..boundary].ends_with('>'));
                prop_assert!(text[..boundary].contains(content));
            }
        }
    }
}
