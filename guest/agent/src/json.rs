//! Writes JSON: as much as the readiness line and the state for hooks need.

use std::fmt::Write;

/// A JSON object being written.
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

    pub fn integer(&mut self, key: &str, value: impl Into<i128>) -> &mut Self {
        self.key(key);
        let _ = write!(self.text, "{}", value.into());
        self
    }

    pub fn finish(&self) -> String {
        format!("{}}}", self.text)
    }
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
    fn strings_are_escaped() {
        let mut object = Object::new();
        object.string("a\"b", "c\\\n\u{1}é").integer("n", -1).raw("o", "{}");
        assert_eq!(object.finish(), "{\"a\\\"b\":\"c\\\\\\u000a\\u0001é\",\"n\":-1,\"o\":{}}");
    }
}
