//! `.env` files by the rules of python-dotenv, which the user's guide assumes, with line numbers for error messages.
//!
//! `NAME=value`, optionally after `export`; blanks around the name and the value are ignored; values in single quotes know
//! `\\` and `\'`, values in double quotes also `\"` and the escapes of C, and both may span lines; an unquoted value ends at
//! a `#` with a blank before it. `${NAME}` and `${NAME:-default}` are replaced. One deliberate difference: in `NAME= # note`
//! the note is a comment and the value is empty.

use std::collections::BTreeMap;

/// `NAME=value` as written in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment {
    pub name: String,
    pub value: String,
    /// Line of the name, from 1.
    pub line: usize,
}

/// A statement that cannot be read; the others still are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Malformed {
    pub line: usize,
    pub what: &'static str,
}

/// Reads a whole file. References are replaced from `environment` first, then from earlier lines.
pub(super) fn parse(text: &str, environment: &BTreeMap<String, String>) -> (Vec<Assignment>, Vec<Malformed>) {
    let mut reader = Reader { rest: text, line: 1 };
    let (mut assignments, mut malformed) = (Vec::new(), Vec::new());
    let mut earlier = BTreeMap::new();
    loop {
        reader.skip(char::is_whitespace);
        if reader.rest.is_empty() {
            return (assignments, malformed);
        }
        let line = reader.line;
        match reader.statement() {
            Ok(Some((name, value))) => {
                let value = expand(&value, |name| environment.get(name).or_else(|| earlier.get(name)));
                earlier.insert(name.clone(), value.clone());
                assignments.push(Assignment { name, value, line });
            }
            Ok(None) => {}
            Err(what) => {
                reader.skip(|character| !is_line_end(character));
                malformed.push(Malformed { line, what });
            }
        }
    }
}

/// What is left of the text, and the line where it begins.
#[derive(Debug)]
struct Reader<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Reader<'a> {
    /// One comment, name or assignment up to the end of its line.
    fn statement(&mut self) -> Result<Option<(String, String)>, &'static str> {
        if !self.rest.starts_with('#')
            && let Some(after) = self.rest.strip_prefix("export")
            && after.starts_with(is_blank)
        {
            self.rest = after;
            self.skip(is_blank);
        }
        let name = self.name()?;
        self.skip(is_blank);
        let assigned = self.rest.starts_with('=');
        let value = if assigned { self.value()? } else { String::new() };
        self.skip(is_blank);
        if self.rest.starts_with('#') {
            self.skip(|character| !is_line_end(character));
        }
        if !self.rest.is_empty() && !self.rest.starts_with(is_line_end) {
            return Err(if assigned { "text after the closing quote" } else { "no = after the name" });
        }
        Ok((assigned && !name.is_empty()).then_some((name, value)))
    }

    fn name(&mut self) -> Result<String, &'static str> {
        if let Some(quoted) = self.rest.strip_prefix('\'') {
            let end = quoted.find('\'').filter(|end| *end > 0).ok_or("a quoted name that does not end")?;
            self.advance(end + 2);
            return Ok(quoted[..end].to_owned());
        }
        let end = self.rest.find(|c: char| c == '=' || c == '#' || c.is_whitespace()).unwrap_or(self.rest.len());
        if end == 0 && !self.rest.starts_with('#') {
            return Err("no name before =");
        }
        Ok(self.advance(end).to_owned())
    }

    fn value(&mut self) -> Result<String, &'static str> {
        self.advance(1);
        let blanks = self.skip(is_blank);
        match self.rest.chars().next() {
            Some('\'') => self.quoted('\'').map(|raw| unescape(raw, |c| matches!(c, '\\' | '\'').then_some(c))),
            Some('"') => self.quoted('"').map(|raw| unescape(raw, double_quote_escape)),
            _ => {
                let end = self.rest.find(is_line_end).unwrap_or(self.rest.len());
                let raw = self.advance(end);
                Ok(without_comment(raw, blanks > 0).trim_end().to_owned())
            }
        }
    }

    /// The text between two unescaped quotes, escapes as written.
    fn quoted(&mut self, quote: char) -> Result<&'a str, &'static str> {
        let mut escaped = false;
        for (place, character) in self.rest.char_indices().skip(1) {
            if character == quote && !escaped {
                let whole = self.advance(place + 1);
                return Ok(&whole[1..place]);
            }
            escaped = character == '\\' && !escaped;
        }
        Err("a quote that does not end")
    }

    /// Skips characters and returns how many bytes they were.
    fn skip(&mut self, what: impl Fn(char) -> bool) -> usize {
        let end = self.rest.find(|character| !what(character)).unwrap_or(self.rest.len());
        self.advance(end);
        end
    }

    fn advance(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.line += taken.matches('\n').count();
        self.rest = rest;
        taken
    }
}

fn is_line_end(character: char) -> bool {
    character == '\n' || character == '\r'
}

fn is_blank(character: char) -> bool {
    character.is_whitespace() && !is_line_end(character)
}

fn without_comment(raw: &str, blank_before: bool) -> &str {
    let mut blank = blank_before;
    for (place, character) in raw.char_indices() {
        if character == '#' && blank {
            return &raw[..place];
        }
        blank = character.is_whitespace();
    }
    raw
}

fn double_quote_escape(character: char) -> Option<char> {
    match character {
        '\\' | '\'' | '"' => Some(character),
        'a' => Some('\u{7}'),
        'b' => Some('\u{8}'),
        'f' => Some('\u{c}'),
        'n' => Some('\n'),
        'r' => Some('\r'),
        't' => Some('\t'),
        'v' => Some('\u{b}'),
        _ => None,
    }
}

fn unescape(raw: &str, escape: impl Fn(char) -> Option<char>) -> String {
    let mut plain = String::with_capacity(raw.len());
    let mut characters = raw.chars().peekable();
    while let Some(character) = characters.next() {
        let escaped = characters.peek().copied().filter(|_| character == '\\').and_then(&escape);
        match escaped {
            Some(escaped) => {
                plain.push(escaped);
                characters.next();
            }
            None => plain.push(character),
        }
    }
    plain
}

fn expand<'a>(value: &str, lookup: impl Fn(&str) -> Option<&'a String>) -> String {
    let mut expanded = String::new();
    let mut rest = value;
    while let Some(start) = rest.find("${") {
        let inside = &rest[start + 2..];
        let Some(end) = inside.find('}') else { break };
        let (name, default) = inside[..end].split_once(":-").unwrap_or((&inside[..end], ""));
        expanded += &rest[..start];
        if name.contains(':') {
            expanded += &rest[start..start + 2 + end + 1];
        } else {
            expanded += lookup(name).map_or(default, String::as_str);
        }
        rest = &inside[end + 1..];
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Vec<(String, String)> {
        let environment = BTreeMap::from([("HOME".to_owned(), "/home/miner".to_owned())]);
        let (assignments, malformed) = parse(text, &environment);
        assert_eq!(malformed, []);
        assignments.into_iter().map(|assignment| (assignment.name, assignment.value)).collect()
    }

    fn value(text: &str) -> String {
        let mut all = values(text);
        assert_eq!(all.len(), 1, "{text:?}: {all:?}");
        let (name, value) = all.remove(0);
        assert_eq!(name, "A", "{text:?}");
        value
    }

    #[test]
    fn values_follow_the_rules() {
        for (text, expected) in [
            ("A=b", "b"),
            ("  export  A = b c  ", "b c"),
            ("A=", ""),
            ("A=\n", ""),
            ("A=b # note", "b"),
            ("A=b#c", "b#c"),
            ("A=#c", "#c"),
            ("A= # note", ""),
            ("A=\t# note", ""),
            ("'A'=b", "b"),
            ("A='b # c' # note", "b # c"),
            (r"A='it\'s \n'", r"it's \n"),
            (r#"A="b\n\"c\" \x""#, "b\n\"c\" \\x"),
            ("A='two\nlines'", "two\nlines"),
            ("A=b'c'", "b'c'"),
            ("A=\u{fc}", "\u{fc}"),
            ("A=b\r\n", "b"),
            ("A=${HOME}/x", "/home/miner/x"),
            ("A='${HOME}'", "/home/miner"),
            ("A=${NOWHERE}x", "x"),
            ("A=${NOWHERE:-y}x", "yx"),
            ("A=$HOME ${", "$HOME ${"),
        ] {
            assert_eq!(value(text), expected, "{text:?}");
        }
    }

    #[test]
    fn lines_are_counted_through_values_that_span_them() {
        let (assignments, malformed) = parse("# first\n\nA='1\n2'\n\nB=3\nC", &BTreeMap::new());
        assert_eq!(malformed, []);
        let lines: Vec<_> = assignments.iter().map(|assignment| (assignment.name.as_str(), assignment.line)).collect();
        assert_eq!(lines, [("A", 3), ("B", 6)]);
    }

    #[test]
    fn later_lines_see_earlier_ones_but_the_environment_wins() {
        assert_eq!(values("A=1\nB=${A}\nHOME=/else\nC=${HOME}")[3], ("C".to_owned(), "/home/miner".to_owned()));
        assert_eq!(values("A=1\nB=${A}2")[1].1, "12");
    }

    #[test]
    fn defects_are_reported_by_line_and_the_rest_is_read() {
        let (assignments, malformed) = parse("=1\nA b\nB='x' y\nC=1\nD='open\nE=2", &BTreeMap::new());
        let defects: Vec<_> = malformed.iter().map(|defect| (defect.line, defect.what)).collect();
        assert_eq!(
            defects,
            [
                (1, "no name before ="),
                (2, "no = after the name"),
                (3, "text after the closing quote"),
                (5, "a quote that does not end"),
            ]
        );
        let names: Vec<_> = assignments.iter().map(|assignment| assignment.name.as_str()).collect();
        assert_eq!(names, ["C", "E"]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_to_its_end(text in "[A='\"\\\\#$\\{\\}: \n\r\tx]{0,60}") {
            let lines = text.matches('\n').count() + 1;
            let (assignments, malformed) = parse(&text, &BTreeMap::new());
            for line in assignments.iter().map(|a| a.line).chain(malformed.iter().map(|m| m.line)) {
                proptest::prop_assert!((1..=lines).contains(&line));
            }
        }
    }
}
