"""Benchmarks in the files in which their owners publish them, found below one folder and read without a network."""

from mmfuse.eval.datasets.files import Medium, Question
from mmfuse.eval.datasets.official import BENCHMARKS, Benchmark, Found, find_files, read_questions

__all__ = ["BENCHMARKS", "Benchmark", "Found", "Medium", "Question", "find_files", "read_questions"]
