//! The date in a chat template: `strftime_now`.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use minijinja::{Error, ErrorKind};

/// Seconds since 1970.
pub(super) fn clock() -> u64 {
    let past = SystemTime::now().duration_since(UNIX_EPOCH);
    past.map_or(0, |past| past.as_secs())
}

/// The directives of Python's `strftime` that jiff writes in the same way. Others differ (`%c`, `%f`, `%x`, `%X`, `%Z`, `%z`)
/// or are of one of the two only, and are errors.
const DIRECTIVES: &str = "aAbBCdDeFgGhHIjmMpRSTuUVwWyY%";

/// The directives that take `-`, which leaves out leading zeros and spaces.
const UNPADDED: &str = "deHIjmMSy";

/// Python's `strftime` in UTC (transformers takes local time), of seconds since 1970.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    check(format)?;
    let failure = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let time = Timestamp::from_second(seconds).map_err(failure)?;
    strtime::format(format, &time.to_zoned(TimeZone::UTC)).map_err(failure)
}

/// Every directive is a known one.
fn check(format: &str) -> Result<(), Error> {
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            continue;
        }
        let mut name = String::from_iter(characters.next());
        let mut known = DIRECTIVES;
        if name == "-" {
            name.extend(characters.next());
            known = UNPADDED;
        }
        let letter = name.chars().last();
        if !letter.is_some_and(|letter| known.contains(letter)) {
            let message = format!("strftime_now does not know %{name}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_pythons() {
        let all = |seconds| strftime("%Y %y %m %d %B %b %A %a %H:%M:%S %%", seconds).unwrap();
        assert_eq!(all(0), "1970 70 01 01 January Jan Thursday Thu 00:00:00 %");
        assert_eq!(
            all(1_709_251_199),
            "2024 24 02 29 February Feb Thursday Thu 23:59:59 %"
        );
        assert_eq!(
            all(4_107_542_400),
            "2100 00 03 01 March Mar Monday Mon 00:00:00 %"
        );
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("%Q"));
    }

    #[test]
    fn further_directives_are_pythons() {
        // Python 3: datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None).strftime(…)
        let all = "%C|%D|%e|%F|%g|%G|%h|%I|%j|%p|%R|%T|%u|%U|%V|%w|%W|%-d|%-e|%-H|%-I|%-j|%-m|%-M|%-S|%-y";
        for (seconds, text) in [
            (
                0,
                "19|01/01/70| 1|1970-01-01|70|1970|Jan|12|001|AM|00:00|00:00:00|4|00|01|4|00|1|1|0|12|1|1|0|0|70",
            ),
            (
                1_709_251_199,
                "20|02/29/24|29|2024-02-29|24|2024|Feb|11|060|PM|23:59|23:59:59|4|08|09|4|09|29|29|23|11|60|2|59|59|24",
            ),
            (
                4_107_542_400,
                "21|03/01/00| 1|2100-03-01|00|2100|Mar|12|060|AM|00:00|00:00:00|1|09|09|1|09|1|1|0|12|60|3|0|0|0",
            ),
            (
                1_735_606_923,
                "20|12/31/24|31|2024-12-31|25|2025|Dec|01|366|AM|01:02|01:02:03|2|52|01|2|53|31|31|1|1|366|12|2|3|24",
            ),
            (
                1_104_537_600,
                "20|01/01/05| 1|2005-01-01|04|2004|Jan|12|001|AM|00:00|00:00:00|6|00|53|6|00|1|1|0|12|1|1|0|0|5",
            ),
        ] {
            assert_eq!(strftime(all, seconds).unwrap(), text);
        }
    }

    #[test]
    fn directives_that_python_writes_otherwise_are_errors() {
        for format in [
            "%c", "%f", "%x", "%X", "%Z", "%z", "%s", "%L", "%", "%-", "%-Y", "%-%", "%é", "%_d",
            "%:z",
        ] {
            let error = strftime(format, 0).unwrap_err().to_string();
            assert!(
                error.contains(&format!("does not know {format}"))
                    || format == "%_d"
                    || format == "%:z",
                "{format}: {error}"
            );
        }
        assert!(strftime("%Y", u64::MAX).is_err());
    }
}
