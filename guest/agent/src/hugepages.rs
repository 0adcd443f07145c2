//! Sets huge pages aside before a hugetlbfs of a given size is mounted.

use std::fs;

use crate::status::{Context, Result, Status};

/// Raises the pool of the wanted page size by the mount's size, and checks that the kernel did it.
pub fn reserve(options: &[String]) -> Result<()> {
    let value = |key: &str| {
        options.iter().flat_map(|option| option.split(',')).find_map(|option| {
            let (name, value) = option.split_once('=')?;
            (name == key).then(|| value.to_owned())
        })
    };
    let (Some(page), Some(size)) = (value("pagesize"), value("size")) else {
        return Err(Status::invalid("hugetlbfs needs pagesize= and size="));
    };
    let page_bytes = bytes(&page)?;
    let size_bytes = bytes(&size)?;
    if page_bytes < 1024 {
        return Err(Status::invalid(format!("pagesize {page:?}")));
    }
    let file = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", page_bytes / 1024);
    let read = || -> Result<u64> {
        let text = fs::read_to_string(&file).context(|| format!("huge pages of {page}"))?;
        text.trim().parse().context(|| file.clone())
    };
    let wanted = read()?.saturating_add(size_bytes.div_ceil(page_bytes));
    fs::write(&file, wanted.to_string()).context(|| format!("writing {file}"))?;
    let got = read()?;
    if got < wanted {
        return Err(Status::internal(format!(
            "the guest has memory for {got} huge pages of {page}, {wanted} are needed"
        )));
    }
    Ok(())
}

/// A number with an optional unit: `2Mi`, `2M`, `1024kB`, `2097152`.
fn bytes(text: &str) -> Result<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches('B').trim_end_matches('i') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(Status::invalid(format!("{text:?} is not a size"))),
    };
    let number: u64 = number.parse().context(|| format!("size {text:?}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| Status::invalid(format!("size {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, value) in [("2Mi", 2 << 20), ("2M", 2 << 20), ("1024kB", 1 << 20), ("7", 7)] {
            assert_eq!(bytes(text).unwrap(), value, "{text}");
        }
        assert!(bytes("2T").is_err() && bytes("M").is_err() && bytes("99999999999G").is_err());
    }
}
