//! `{% generation %}` … `{% endgeneration %}`, with which templates mark what the assistant wrote.
//!
//! Only training uses the marks; for a prompt the block is a scope around its content, which `with` is too.

/// `source` with the tags replaced, or `None` if it has none.
pub fn as_scopes(source: &str) -> Option<String> {
    if !source.contains("generation") {
        return None;
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find('{') {
        let (before, tail) = rest.split_at(start);
        out.push_str(before);
        let length = match tail.as_bytes().get(1) {
            Some(b'#') => tail.find("#}").map_or(tail.len(), |end| end + 2),
            Some(b'{') => end_of_tag(tail, "}}"),
            Some(b'%') => block_length(tail),
            _ => 1,
        };
        let (tag, after) = tail.split_at(length);
        match replacement(tag) {
            Some(scope) => {
                found = true;
                out.push_str(&scope);
            }
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    found.then_some(out)
}

/// Bytes up to and including `end`, which does not count inside a quoted text.
fn end_of_tag(text: &str, end: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '\'' || c == '"' => quote = Some(c),
            None if text[at..].starts_with(end) => return at + end.len(),
            None => {}
        }
    }
    text.len()
}

/// Bytes of a block tag; a `raw` block counts up to the end of its `endraw`.
fn block_length(text: &str) -> usize {
    let mut length = end_of_tag(text, "%}");
    if name(&text[..length]) != Some("raw") {
        return length;
    }
    while let Some(next) = text[length..].find("{%") {
        let start = length + next;
        length = start + end_of_tag(&text[start..], "%}");
        if name(&text[start..length]) == Some("endraw") {
            return length;
        }
    }
    text.len()
}

/// Content of a block tag if it is a single word.
fn name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner).trim();
    (!inner.is_empty() && inner.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).then_some(inner)
}

fn replacement(tag: &str) -> Option<String> {
    match name(tag)? {
        "generation" => Some(tag.replacen("generation", "with", 1)),
        "endgeneration" => Some(tag.replacen("endgeneration", "endwith", 1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::as_scopes;

    #[test]
    fn tags_become_scopes() {
        let source = "{%- generation -%}{{ x }}{%+ endgeneration\n%}";
        assert_eq!(as_scopes(source).unwrap(), "{%- with -%}{{ x }}{%+ endwith\n%}");
    }

    #[test]
    fn other_mentions_stay() {
        for source in [
            "no tag at all",
            "{{ add_generation_prompt }} {% if add_generation_prompt %}{% endif %}",
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"{% generation %}\" }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set x = '%}{% generation %}' %}",
            "{% generation",
            "{",
        ] {
            assert_eq!(as_scopes(source), None, "{source}");
        }
    }
}
