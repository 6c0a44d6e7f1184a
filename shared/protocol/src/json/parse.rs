//! `json.loads` of a text, without recursion.

use num_bigint::BigInt;

use super::{Object, Text, Value};

/// Nesting at which parsing stops. CPython has such a bound, too: it raises `RecursionError` at a depth that depends on its version
/// and on the caller. This one keeps the recursive writer and destructor within any thread's stack.
pub const MAX_DEPTH: usize = 1_500;

/// Digits at which `int()` refuses a text (`sys.int_info.default_max_str_digits`).
pub const MAX_INTEGER_DIGITS: usize = 4_300;

/// A text that `json.loads` refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct ParseError {
    /// Where, in bytes from the start.
    pub offset: usize,
    /// What.
    pub kind: ParseErrorKind,
}

/// Reasons of a [`ParseError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseErrorKind {
    /// Neither a literal nor the start of a value.
    #[error("a value is expected")]
    ExpectedValue,
    /// An object member does not start with a string.
    #[error("a property name in double quotes is expected")]
    ExpectedKey,
    /// No colon after a key.
    #[error("a colon is expected")]
    ExpectedColon,
    /// Neither a comma nor the closing bracket.
    #[error("a comma or a closing bracket is expected")]
    ExpectedComma,
    /// A string without a closing quote.
    #[error("a string does not end")]
    UnterminatedString,
    /// A raw character below U+0020 in a string.
    #[error("a control character in a string")]
    ControlCharacter,
    /// A backslash before something else than an escape.
    #[error("an invalid escape")]
    InvalidEscape,
    /// An integer that Python refuses to convert.
    #[error("an integer of more than {MAX_INTEGER_DIGITS} digits")]
    IntegerTooLong,
    /// More than [`MAX_DEPTH`] brackets are open.
    #[error("nesting deeper than {MAX_DEPTH}")]
    TooDeep,
    /// Something after the value.
    #[error("extra data after the value")]
    ExtraData,
}

/// Parses one JSON text as `json.loads` does: `NaN`, `Infinity` and `-Infinity` are floats, a repeated key keeps its last
/// value, lone surrogate escapes are kept, numbers beyond binary64 become infinite.
///
/// # Errors
/// [`ParseError`] wherever `json.loads` raises.
pub fn parse(text: &str) -> Result<Value, ParseError> {
    let mut parser = Parser { text, at: 0 };
    let value = parser.document()?;
    parser.skip_white_space();
    if parser.at < text.len() { Err(parser.error(ParseErrorKind::ExtraData)) } else { Ok(value) }
}

/// A container whose closing bracket has not been met.
enum Open {
    Array(Vec<Value>),
    /// Finished members, and the key of the one being read.
    Object(Vec<(Text, Value)>, Text),
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn document(&mut self) -> Result<Value, ParseError> {
        let mut open: Vec<Open> = Vec::new();
        loop {
            self.skip_white_space();
            let Some(mut value) = self.scalar_or_open(&mut open)? else { continue };
            // Hand the finished value to the container it stands in; a container that ends with it is the next finished value.
            loop {
                let Some(container) = open.pop() else { return Ok(value) };
                match self.add_to(container, value)? {
                    Added::Continues(container) => {
                        open.push(container);
                        break;
                    }
                    Added::Finished(container) => value = container,
                }
            }
        }
    }

    /// Reads one scalar or empty container, or opens a container (`None`) and stops before its first value.
    fn scalar_or_open(&mut self, open: &mut Vec<Open>) -> Result<Option<Value>, ParseError> {
        if open.len() == MAX_DEPTH && matches!(self.peek(), Some(b'[' | b'{')) {
            return Err(self.error(ParseErrorKind::TooDeep));
        }
        let container = match self.peek() {
            Some(b'"') => return self.string().map(|text| Some(Value::String(text))),
            Some(b'[') => {
                self.at += 1;
                self.skip_white_space();
                if self.take(b']') {
                    return Ok(Some(Value::Array(Vec::new())));
                }
                Open::Array(Vec::new())
            }
            Some(b'{') => {
                self.at += 1;
                self.skip_white_space();
                if self.take(b'}') {
                    return Ok(Some(Value::Object(Object::default())));
                }
                Open::Object(Vec::new(), self.key()?)
            }
            Some(b'-' | b'0'..=b'9') => return self.number().map(Some),
            _ => return self.literal().map(Some),
        };
        open.push(container);
        Ok(None)
    }

    fn add_to(&mut self, container: Open, value: Value) -> Result<Added, ParseError> {
        self.skip_white_space();
        match container {
            Open::Array(mut elements) => {
                elements.push(value);
                if self.take(b',') {
                    Ok(Added::Continues(Open::Array(elements)))
                } else if self.take(b']') {
                    Ok(Added::Finished(Value::Array(elements)))
                } else {
                    Err(self.error(ParseErrorKind::ExpectedComma))
                }
            }
            Open::Object(mut members, key) => {
                members.push((key, value));
                if self.take(b',') {
                    self.skip_white_space();
                    Ok(Added::Continues(Open::Object(members, self.key()?)))
                } else if self.take(b'}') {
                    Ok(Added::Finished(Value::Object(Object::from_pairs(members))))
                } else {
                    Err(self.error(ParseErrorKind::ExpectedComma))
                }
            }
        }
    }

    /// `"key" :`
    fn key(&mut self) -> Result<Text, ParseError> {
        if self.peek() != Some(b'"') {
            return Err(self.error(ParseErrorKind::ExpectedKey));
        }
        let key = self.string()?;
        self.skip_white_space();
        if self.take(b':') { Ok(key) } else { Err(self.error(ParseErrorKind::ExpectedColon)) }
    }

    fn literal(&mut self) -> Result<Value, ParseError> {
        const LITERALS: [(&str, Value); 5] = [
            ("null", Value::Null),
            ("true", Value::Bool(true)),
            ("false", Value::Bool(false)),
            ("NaN", Value::Float(f64::NAN)),
            ("Infinity", Value::Float(f64::INFINITY)),
        ];
        for (name, value) in LITERALS {
            if self.rest().starts_with(name) {
                self.at += name.len();
                return Ok(value);
            }
        }
        Err(self.error(ParseErrorKind::ExpectedValue))
    }

    fn number(&mut self) -> Result<Value, ParseError> {
        let start = self.at;
        if self.take(b'-') && self.rest().starts_with("Infinity") {
            self.at += "Infinity".len();
            return Ok(Value::Float(f64::NEG_INFINITY));
        }
        let first_digit = self.at;
        if !self.take(b'0') {
            self.skip_digits();
        }
        if self.at == first_digit {
            self.at = start;
            return Err(self.error(ParseErrorKind::ExpectedValue));
        }
        let integer_end = self.at;
        self.skip_suffix(b".", b"");
        self.skip_suffix(b"eE", b"+-");
        let text = &self.text[start..self.at];
        if self.at > integer_end {
            return Ok(Value::Float(text.parse().expect("the grammar of JSON is part of Rust's for floats")));
        }
        if integer_end - first_digit > MAX_INTEGER_DIGITS {
            self.at = start;
            return Err(self.error(ParseErrorKind::IntegerTooLong));
        }
        Ok(text.parse::<i64>().map_or_else(
            |_| Value::from(text.parse::<BigInt>().expect("an optional minus and digits are an integer")),
            Value::Int,
        ))
    }

    /// Skips one of `marks`, perhaps one of `signs`, and digits; without a mark or a digit nothing is skipped.
    fn skip_suffix(&mut self, marks: &[u8], signs: &[u8]) {
        let start = self.at;
        if !self.peek().is_some_and(|byte| marks.contains(&byte)) {
            return;
        }
        self.at += 1;
        if self.peek().is_some_and(|byte| signs.contains(&byte)) {
            self.at += 1;
        }
        let digits = self.at;
        self.skip_digits();
        if self.at == digits {
            self.at = start;
        }
    }

    fn skip_digits(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
    }

    /// A string from its opening quote on.
    fn string(&mut self) -> Result<Text, ParseError> {
        let opening = self.at;
        self.at += 1;
        let mut text = Text::default();
        loop {
            let plain = self.rest().bytes().take_while(|byte| !matches!(byte, b'"' | b'\\' | 0..=0x1F)).count();
            text.push_str(&self.text[self.at..self.at + plain]);
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(text);
                }
                Some(b'\\') => self.escape(&mut text)?,
                Some(_) => return Err(self.error(ParseErrorKind::ControlCharacter)),
                None => {
                    self.at = opening;
                    return Err(self.error(ParseErrorKind::UnterminatedString));
                }
            }
        }
    }

    fn escape(&mut self, text: &mut Text) -> Result<(), ParseError> {
        let invalid = self.error(ParseErrorKind::InvalidEscape);
        self.at += 1;
        let escape = self.peek().ok_or(invalid)?;
        self.at += 1;
        let character = match escape {
            b'"' | b'\\' | b'/' => char::from(escape),
            b'b' => '\u{8}',
            b'f' => '\u{C}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let unit = self.hex_unit().ok_or(invalid)?;
                return self.unicode_escape(text, unit);
            }
            _ => return Err(invalid),
        };
        text.push(character);
        Ok(())
    }

    /// Adds `unit`, joined with an escape of the other half that follows at once.
    fn unicode_escape(&mut self, text: &mut Text, unit: u16) -> Result<(), ParseError> {
        if let Some(character) = char::from_u32(unit.into()) {
            text.push(character);
            return Ok(());
        }
        let after = self.at;
        if unit < 0xDC00 && self.rest().starts_with("\\u") {
            let invalid = self.error(ParseErrorKind::InvalidEscape);
            self.at += 2;
            let second = self.hex_unit().ok_or(invalid)?;
            if let Some(Ok(character)) = char::decode_utf16([unit, second]).next() {
                text.push(character);
                return Ok(());
            }
            self.at = after;
        }
        text.push_surrogate(unit);
        Ok(())
    }

    fn hex_unit(&mut self) -> Option<u16> {
        let digits = self.rest().get(..4).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        let unit = u16::from_str_radix(digits, 16).ok()?;
        self.at += 4;
        Some(unit)
    }

    fn skip_white_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Only called at a character boundary: every step above goes over whole characters.
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    const fn error(&self, kind: ParseErrorKind) -> ParseError {
        ParseError { offset: self.at, kind }
    }
}

enum Added {
    Continues(Open),
    Finished(Value),
}
