"""`python -m grpo_fast.doctor`: the same as `grpo-fast doctor`."""

import sys

if __name__ == "__main__":
    try:
        from grpo_fast.doctor.command import main
    except (ImportError, ValueError) as error:  # torch is too old, or a switch has a wrong value
        print(f"grpo-fast doctor: error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, ImportError) else 2) from None
    raise SystemExit(main())
