"""Serverless functions: one model, opened once, behind the events of AWS Lambda, Tencent SCF and Alibaba FC."""
