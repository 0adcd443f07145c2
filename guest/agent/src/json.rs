//! Writes JSON: as much as the OCI runtime's files and the readiness line need.

use std::fmt::Write;

/// A JSON object being written; values that are at their protobuf default can be left out.
pub struct Object {
    text: String,
}

impl Object {
    pub fn new() -> Self {
        Self { text: String::from("{") }
    }

    fn key(&mut self, key: &str) {
        if self.text.len() > 1 {
            self.text.push(',');
        }
        quote(&mut self.text, key);
        self.text.push(':');
    }

    /// Adds a value that is JSON already.
    pub fn raw(&mut self, key: &str, json: &str) -> &mut Self {
        self.key(key);
        self.text.push_str(json);
        self
    }

    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        quote(&mut self.text, value);
        self
    }

    /// Adds the string unless it is empty.
    pub fn string_if(&mut self, key: &str, value: &str) -> &mut Self {
        if value.is_empty() { self } else { self.string(key, value) }
    }

    pub fn integer(&mut self, key: &str, value: impl Into<i128>) -> &mut Self {
        self.key(key);
        let _ = write!(self.text, "{}", value.into());
        self
    }

    /// Adds the number unless it is zero.
    pub fn integer_if(&mut self, key: &str, value: impl Into<i128>) -> &mut Self {
        let value = value.into();
        if value == 0 { self } else { self.integer(key, value) }
    }

    pub fn boolean(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, if value { "true" } else { "false" })
    }

    /// Adds a list of strings unless it is empty.
    pub fn strings_if(&mut self, key: &str, values: &[String]) -> &mut Self {
        if values.is_empty() { self } else { self.raw(key, &strings(values)) }
    }

    /// Adds a list of values that are JSON already, unless it is empty.
    pub fn list_if(&mut self, key: &str, values: &[String]) -> &mut Self {
        if values.is_empty() { self } else { self.raw(key, &list(values)) }
    }

    pub fn finish(&self) -> String {
        format!("{}}}", self.text)
    }
}

/// A JSON list of values that are JSON already.
pub fn list(values: &[String]) -> String {
    format!("[{}]", values.join(","))
}

fn strings(values: &[String]) -> String {
    let quoted: Vec<String> = values
        .iter()
        .map(|value| {
            let mut text = String::with_capacity(value.len() + 2);
            quote(&mut text, value);
            text
        })
        .collect();
    list(&quoted)
}

fn quote(out: &mut String, value: &str) {
    out.push('"');
    for character in value.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped_and_defaults_left_out() {
        let mut object = Object::new();
        object.string("a\"b", "c\\\n\u{1}é").string_if("empty", "").integer_if("zero", 0);
        object.integer("n", -1).boolean("t", true).strings_if("l", &["x".into(), "y".into()]);
        assert_eq!(
            object.finish(),
            "{\"a\\\"b\":\"c\\\\\\u000a\\u0001é\",\"n\":-1,\"t\":true,\"l\":[\"x\",\"y\"]}"
        );
    }
}
